"""Errors while a checkpoint is completed in the background: all ranks end with them at the next save or at the end."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_disks import (
    ALONE,
    DDP,
    ZERO3,
    Disk,
    assert_same_model,
    mounted_disk,
    recipe_writer,
    start,
    trouble,
    untouched_runs,
    whole,
)
from ranks import sft
from small_runs import Kind

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path_factory.mktemp("rows"), tiny_model)


@pytest.fixture(scope="module")
def untouched(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    return untouched_runs(recipe_of, tmp_path_factory)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted_disk(tmp_path) as disk:
        yield disk


def with_trouble_in_background_at(*arguments: str) -> int:
    """Train on a disk that breaks when the files of checkpoint STEP are synced: `HOW,STEP,REPAIRED,FOLDER,CONTENT`.

    `failing` breaks no disk, but the last rank's fsync.
    """
    *rest, trouble = arguments
    how, step, mended, folder, content = trouble.split(",")
    disk = Disk(Path(folder), Path(content))
    from train.loop.checkpoint.writer import CheckpointWriter

    sync, begin = CheckpointWriter._sync, CheckpointWriter.save
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def sync_with_trouble(self: CheckpointWriter, saved: Path, names: list[str]) -> dict[str, Any]:
        if saved.name == f"checkpoint-{step}" and how == "failing" and rank == ranks - 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if saved.name == f"checkpoint-{step}" and how != "failing" and rank == 0:
            disk.make_trouble(how)
        return sync(self, saved, names)

    def save(self: CheckpointWriter, now: int, *args: Any, **more: Any) -> bool:
        if now == int(mended) and rank == 0:
            disk.mend(how)
        return begin(self, now, *args, **more)

    CheckpointWriter._sync, CheckpointWriter.save = sync_with_trouble, save
    return sft(*rest)


ENDED_LATER = [
    (ALONE, "full-0", 4, "No space left on device"),  # in COMPLETE.json, at the end of training
    (ZERO3, "full-0", 2, "No space left on device"),
    (DDP, "read-only", 2, "Read-only file system"),
    (DDP, "failing", 2, "Input/output error"),
    (ZERO3, "failing", 4, "Input/output error"),
]


@pytest.mark.parametrize(
    ("kind", "how", "step", "said"),
    ENDED_LATER,
    ids=[f"{kind.name}-{how}-{step}" for kind, how, step, _ in ENDED_LATER],
)
def test_an_error_in_the_background_ends_a_run_at_its_next_save_or_its_end(
    kind: Kind,
    how: str,
    step: int,
    said: str,
    recipe_of: Callable[..., Path],
    untouched: Callable[[Kind], Path],
    disk: Disk,
    tmp_path: Path,
) -> None:
    run = disk.folder / "run"
    recipe = recipe_of(kind, run, tmp_path / "recipe.yaml", training={"save_total_limit": 2})
    job = with_trouble_in_background_at
    outcome = start(kind, recipe, tmp_path / "logs", trouble(disk, how, step, 0), job=job)
    assert outcome.exit_codes == [2] * kind.processes
    text = "".join(outcome.output)
    assert text.count("error: ") == 1
    assert (
        f"error: output_dir: {run / f'checkpoint-{step}'} couldn't be written: {said}. checkpoint-{step - 1} is "
        in text
    )
    assert "Traceback" not in text
    assert whole(disk.content / "run") == list(range(1, step))[-2:]  # none was deleted for it
    disk.mend(how)
    outcome = start(kind, recipe, tmp_path / "again").succeeded()
    assert f"resuming from {run / f'checkpoint-{step - 1}'}" in outcome.output[0]
    assert_same_model(run, untouched(kind))
    assert whole(run) == [3, 4]
    assert not (run / "unfinished").exists()


@pytest.mark.parametrize(
    ("kind", "how"), [(ALONE, "full-0"), (ZERO3, "failing")], ids=["alone-full-0", "zero3-failing"]
)
def test_on_error_warn_continues_after_an_error_in_the_background(
    kind: Kind, how: str, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], disk: Disk, tmp_path: Path
) -> None:
    run = disk.folder / "run"
    recipe = recipe_of(kind, run, tmp_path / "recipe.yaml", save={"on_error": "warn"})
    job = with_trouble_in_background_at
    outcome = start(kind, recipe, tmp_path / "logs", trouble(disk, how, 2, 3), job=job).succeeded()
    assert outcome.output[0].count("warning: output_dir: ") == 1
    assert f"{run / 'checkpoint-2'} couldn't be written: " in outcome.output[0]
    assert whole(run) == [1, 3, 4]
    assert_same_model(run, untouched(kind))
    assert not (run / "unfinished").exists()
