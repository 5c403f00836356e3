"""Verification of checkpoints by four ranks: every file is read once, and all learn of damage that one finds."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import launch

from train.loop.checkpoint.joint_verification import share_files, verify_jointly
from train.loop.checkpoint.manifest import COMPLETE, Checkpoint, describe_file, format_manifest, list_files

RANKS = 4
KILOBYTES = {"model.safetensors": 900, "optimizer/0.pt": 700, "optimizer/1.pt": 650, "rng_state.pth": 20, "a.json": 3}


def write_checkpoint(folder: Path, step: int = 1) -> Path:
    """Write files of KILOBYTES with a manifest."""
    for name, size in KILOBYTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(size * 1_000))
    files = {name: describe_file(folder / name) for name in list_files(folder)}
    (folder / COMPLETE).write_text(format_manifest({"step": step, "files": files}), encoding="utf-8")
    return folder


def flip(path: Path) -> None:
    """Change one byte, and not the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bytes_read() -> int:
    """Return the bytes that read() has returned to this process (proc(5), rchar)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def verify(cases: str, report: str) -> None:
    """Verify each case's folders of this rank; write the results and the bytes read."""
    rank = int(os.environ["RANK"])
    reports = []
    for folders in json.loads(Path(cases).read_text())[rank]:
        before = bytes_read()
        results = list(verify_jointly([Path(folder) for folder in folders]))
        texts = [str(result.folder) if isinstance(result, Checkpoint) else result for result in results]
        reports.append({"results": texts, "read": bytes_read() - before})
    Path(f"{report}-{rank}.json").write_text(json.dumps(reports))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def verified(root: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Return a function from the name of a case to the report of each rank. All cases are verified in one launch."""
    whole, copied = write_checkpoint(root / "whole"), root / "copied"
    shutil.copytree(whole, copied)
    damaged = [write_checkpoint(root / f"damaged-{number}") for number in range(len(KILOBYTES))]
    for folder, name in zip(damaged, KILOBYTES, strict=True):
        flip(folder / name)
    twice = write_checkpoint(root / "damaged-twice")
    flip(twice / "model.safetensors")
    (twice / "optimizer" / "1.pt").unlink()
    copy_damaged = shutil.copytree(whole, root / "copy-damaged")
    flip(copy_damaged / "optimizer" / "0.pt")
    other = write_checkpoint(root / "other", step=2)
    cases = {  # the folders of each rank
        "shared": [[whole]] * RANKS,
        "damaged": [[*damaged, twice, whole, root / "nowhere"]] * RANKS,
        "copies": [[whole], [whole], [copied], [copied]],
        "damaged copy": [[whole], [whole], [copy_damaged], [copy_damaged]],
        "different": [[whole], [whole], [other], []],
    }
    by_rank = [[[str(folder) for folder in case[rank]] for case in cases.values()] for rank in range(RANKS)]
    (root / "cases.json").write_text(json.dumps(by_rank))
    launch(RANKS, None, root / "cases.json", root / "report", job=verify, logs=root / "logs").succeeded()
    reports = [json.loads((root / f"report-{rank}.json").read_text()) for rank in range(RANKS)]
    return lambda name: [report[list(cases).index(name)] for report in reports]


TOTAL = sum(KILOBYTES.values()) * 1_000
MANIFEST = 20_000
"""Bytes; more than each rank reads of the manifest and of modules that it imports meanwhile."""


def test_each_file_is_read_once_by_all_ranks_together(root: Path, verified: Callable[..., list[Any]]) -> None:
    reports = verified("shared")
    assert [report["results"] for report in reports] == [[str(root / "whole")]] * RANKS
    read = [report["read"] for report in reports]
    assert TOTAL <= sum(read) < TOTAL + RANKS * MANIFEST
    assert max(read) < max(KILOBYTES.values()) * 1_000 + MANIFEST  # one of the three large files each


def test_all_ranks_return_the_same_sentence_about_any_damaged_file(
    root: Path, verified: Callable[..., list[Any]]
) -> None:
    expected = [f"{root / f'damaged-{number}' / name} is damaged." for number, name in enumerate(KILOBYTES)]
    expected.append(f"{root / 'damaged-twice' / 'model.safetensors'} is damaged.")  # the first of the two
    expected.append(str(root / "whole"))
    expected.append(f"{root / 'nowhere'} does not exist or is not a checkpoint: it has no {COMPLETE}.")
    assert [report["results"] for report in verified("damaged")] == [expected] * RANKS


def test_copies_on_two_disks_are_each_read_once(root: Path, verified: Callable[..., list[Any]]) -> None:
    reports = verified("copies")
    assert [report["results"] for report in reports] == [
        [str(root / name)] for name in ("whole",) * 2 + ("copied",) * 2
    ]
    for node in reports[:2], reports[2:]:
        assert TOTAL <= sum(report["read"] for report in node) < TOTAL + 2 * MANIFEST


def test_damage_in_the_copy_of_one_node_is_an_error_on_all(root: Path, verified: Callable[..., list[Any]]) -> None:
    sentence = f"{root / 'copy-damaged' / 'optimizer' / '0.pt'} is damaged."
    assert [report["results"] for report in verified("damaged copy")] == [[sentence]] * RANKS


def test_ranks_with_different_checkpoints_verify_their_own(root: Path, verified: Callable[..., list[Any]]) -> None:
    whole, other = str(root / "whole"), str(root / "other")
    assert [report["results"] for report in verified("different")] == [[whole], [whole], [other], []]


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_shares_are_disjoint_complete_and_balanced(readers: int) -> None:
    sizes = {f"file-{number}": random.Random(number).randint(1, 1_000) for number in range(40)}
    shares = [share_files(sizes, reader, readers) for reader in range(readers)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= 4 / 3 * sum(sizes.values()) / readers
