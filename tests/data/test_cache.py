"""Cache: an entry is complete or missing, whichever process is killed; one process builds it while others wait."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.data.cache import cache_key, find, get_or_build, report_progress
from train.errors import UserError
from train.progress import ProgressBar


def build(folder: Path) -> dict:
    (folder / "rows").write_bytes(b"some rows")
    (folder / "more").write_bytes(b"")
    return {"rows": 2}


def never(folder: Path) -> dict:
    raise AssertionError("it is there already")


def test_an_entry_is_built_once_and_then_found(tmp_path: Path) -> None:
    entry = get_or_build(tmp_path / "a" / "b", "k", build)
    assert (entry.hit, entry.facts, (entry.folder / "rows").read_bytes()) == (False, {"rows": 2}, b"some rows")
    again = get_or_build(tmp_path / "a" / "b", "k", never)
    assert (again.hit, again.facts, again.folder) == (True, {"rows": 2}, entry.folder)
    assert find(tmp_path / "a" / "b", "other") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "rows").write_bytes(b"some r0ws"),
        lambda folder: (folder / "rows").write_bytes(b"some row"),
        lambda folder: (folder / "more").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"files": {"rows": 1}, "facts": {}}'),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"rows": 2', '"rows": 3')
        ),
        lambda folder: (folder.rename(folder.with_name("away")), folder.touch()),
    ],
)
def test_a_damaged_entry_is_built_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(get_or_build(tmp_path, "k", build).folder)
    assert find(tmp_path, "k") is None
    entry = get_or_build(tmp_path, "k", build)
    assert not entry.hit
    assert (entry.folder / "rows").read_bytes() == b"some rows"
    assert find(tmp_path, "k") is not None


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict:
        (folder / "rows").write_bytes(b"half")
        raise UserError("no such row")

    with pytest.raises(UserError, match="no such row"):
        get_or_build(tmp_path, "k", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]


def test_the_partial_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / "k.host-1.partial"
    partial.mkdir()
    (partial / "rows").write_bytes(b"half")
    other = tmp_path / "other.host-1.partial"
    other.mkdir()
    get_or_build(tmp_path, "k", build)
    assert not partial.exists()
    assert other.exists()  # another key may be in the making


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file.* can't be written"):
        get_or_build(tmp_path / "file", "k", build)


def _make_slowly(folder: Path, started: Path) -> None:
    def slow(partial: Path) -> dict:
        report_progress(partial, 1_234)
        started.touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return build(partial)

    get_or_build(folder, "k", slow)


def test_other_processes_wait_for_the_builder_and_show_its_progress(tmp_path: Path) -> None:
    maker = multiprocessing.get_context("fork").Process(target=_make_slowly, args=(tmp_path, tmp_path / "started"))
    maker.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.01)

    class Waiting(ProgressBar):
        def advance(self, amount: int = 1) -> None:
            super().advance(amount)
            (tmp_path / "go").touch()  # now that we have seen it wait

    waiting = Waiting("waiting", None, "rows", None)
    assert get_or_build(tmp_path, "k", never, waiting).hit
    assert waiting.done == 1_234
    maker.join()
    assert maker.exitcode == 0


def test_of_two_simultaneous_builds_one_is_kept(tmp_path: Path) -> None:
    """As on a file system without locks: the second builder finds the first one's entry."""

    def overtaken(partial: Path) -> dict:
        (tmp_path / "elsewhere").mkdir()
        get_or_build(tmp_path / "elsewhere", "k", build).folder.rename(tmp_path / "k")
        (partial / "rows").write_bytes(b"mine")
        return {"rows": 1}

    assert get_or_build(tmp_path, "k", overtaken).facts == {"rows": 2}
    assert not list(tmp_path.glob("*.partial"))


def test_the_key_follows_from_every_part() -> None:
    parts = {"a": 1, "b": ["x", None], "c": {"y": 2.5}}
    assert cache_key(parts) == cache_key(dict(reversed(parts.items())))
    others = [{**parts, "a": 2}, {**parts, "b": ["x"]}, {**parts, "c": {"y": 2.25}}, {**parts, "d": None}]
    assert len({cache_key(key_parts) for key_parts in [parts, *others]}) == 5


PREPARE = """
import os
import signal
import sys
import time
from train.data.chat.template import use_template
from train.data.prepare import prepare
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe


def start(cache):
    child = os.fork()
    if child == 0:
        recipe = load_recipe(sys.argv[1], [f"data.cache_dir={cache}", "data.processes=2"])
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        prepare(recipe, tokenizer)
        os._exit(0)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
KILLED = """
undisturbed, killed = sys.argv[2:]
began = time.monotonic()
assert ended(start(undisturbed)) == 0
seconds = time.monotonic() - began
killings = 0
for attempt in range(20):
    child = start(killed)
    time.sleep(seconds * (attempt + 0.5) / 20)
    os.kill(child, signal.SIGKILL)
    killings += ended(child) == -signal.SIGKILL
assert killings >= 10, killings
assert ended(start(killed)) == 0
"""
AT_ONCE = """
children = [start(sys.argv[2]) for _ in range(3)]
assert [ended(child) for child in children] == [0, 0, 0]
"""


def run(script: str, *arguments: object) -> None:
    """Run a script; it ends after the workers of killed processes, which hold its standard output."""
    command = [sys.executable, "-c", PREPARE + script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2_000:]


def many_rows(path: Path) -> Path:
    turns = [{"role": "user", "content": "river stone " * 40}, {"role": "assistant", "content": "cloud amber " * 60}]
    line = json.dumps({"messages": [{"role": "system", "content": "Answer row NUMBER."}, *turns]})
    path.write_text("".join(line.replace("NUMBER", str(number)) + "\n" for number in range(12_000)))
    return path


def contents(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def test_killed_at_any_moment_the_next_call_ends_with_the_same_bytes(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_file(data={"sources": [{"path": str(many_rows(tmp_path / "many.jsonl"))}]})
    run(KILLED, recipe, tmp_path / "undisturbed", tmp_path / "killed")
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 4  # rows and plan, with a manifest each
    assert contents(tmp_path / "killed") == expected


def test_processes_that_start_at_once_share_one_result(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_file(data={"sources": [{"path": str(many_rows(tmp_path / "many.jsonl"))}]})
    run(AT_ONCE, recipe, tmp_path / "shared")
    assert len(contents(tmp_path / "shared")) == 4
