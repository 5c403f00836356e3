"""Atomic writes: on a full disk all files of a command stay as they were."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripted_server import Asked, Reply, said, served

from train.storage.atomic_write import atomic_write, write_text

OURS = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit files to `size` bytes, which has the effect of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_stay_unchanged_if_one_write_fails(tmp_path: Path) -> None:
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    small.write_text("old content", encoding="utf-8")

    def write() -> None:
        with atomic_write(small, large) as [first, second]:
            assert (first.suffix, second.suffix) == (".json", ".json")  # matplotlib selects the format by the suffix
            write_text(first, "new")
            write_text(second, "x" * 20_000)

    with file_size_limit(10_000), pytest.raises(OSError, match="File too large"):
        write()
    assert contents(tmp_path) == {"small.json": b"old content"}
    write()
    assert contents(tmp_path) == {"small.json": b"new", "large.json": b"x" * 20_000}


def test_a_folder_with_the_name_of_a_file_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "file", tmp_path / "folder"):
        pytest.fail("nothing may be written")


def test_a_lone_surrogate_is_written_as_a_json_escape(tmp_path: Path) -> None:
    write_text(tmp_path / "file", json.dumps("\ud83d \u2028", ensure_ascii=False))
    assert json.loads((tmp_path / "file").read_bytes()) == "\ud83d \u2028"


def test_gain_and_compare_on_a_full_disk_keep_the_old_files(
    command: Callable[..., int], says_no: Callable[..., str], tiny_chat_model: Path, tmp_path: Path
) -> None:
    rows = [
        {"system": f"Be {what}.", "prompt": f"q {row}", "output": f"{row} river"}
        for row in range(2)
        for what in ("a river", "a stone")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "out").mkdir()
    gain = ("gain", "--model", tiny_chat_model, "--data", data, "--json", tmp_path / "out" / "gain.json")
    assert command(*gain) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert command("compare", tmp_path / "copy", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    full = tmp_path / "out" / "gain_scores.jsonl"
    for asked in (gain, (*gain, "--others", "1", "--dtype", "bfloat16")):  # nothing to score, and all rows
        with file_size_limit(full.stat().st_size):
            assert says_no(*asked) == f"{full} can't be written: File too large."
    room = 1 + max(len(text) for name, text in before.items() if not name.endswith(".png"))
    assert room < min(len(text) for name, text in before.items() if name.endswith(".png"))
    for asked in ((*gain, "--seed", "1"), ("compare", tmp_path / "copy", tmp_path / "out", "--seed", "1")):
        with file_size_limit(room):
            assert says_no(*asked) == f"{tmp_path / 'out'}: cannot be written: File too large"
        after = contents(tmp_path / "out")
        after["gain_scores.jsonl"] = before["gain_scores.jsonl"]  # the journal, which only grows
        assert after == before


async def answers(asked: Asked) -> Reply:
    return said("A river. [RESULT] 4")


def test_a_plot_that_cannot_be_written_leaves_the_old_results(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path
) -> None:
    """ifeval and bench write the plot last; here a folder has its name."""
    with served(answers) as server:
        asked = {
            "ifeval": ("--data", OURS / "system_ifeval.jsonl", "--limit", "3", "--max-new-tokens"),
            "bench": ("--data", OURS / "bench.jsonl", "--judge", "j", "--judge-server", server.url, "--limit", "2",
                      "--judge-max-tokens"),
        }  # fmt: skip
        for name, options in asked.items():
            folder = tmp_path / name
            arguments = (name, "--model", "m", "--server", server.url, "--output-dir", folder, *options)
            assert command(*arguments, "64") == 0
            before = (folder / f"{name}.json").read_bytes()
            (folder / f"{name}.png").unlink()
            (folder / f"{name}.png").mkdir()
            assert says_no(*arguments, "65") == f"{folder}: cannot be written: Is a directory"
            assert (folder / f"{name}.json").read_bytes() == before
