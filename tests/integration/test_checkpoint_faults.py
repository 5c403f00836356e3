"""Checkpoints on full, read-only and lost disks, and damaged checkpoints, on several processes.

Full disks are small tmpfs mounts, so these tests run as root on Linux.
"""

import json
import os
import shutil
import time
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

ZERO3_LORA = Kind("zero3-lora", 2, "zero3.yaml", adapter=True)


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


def with_trouble_at(*arguments: str) -> int:
    """Train on a disk that breaks when checkpoint STEP is written: `HOW,STEP,REPAIRED,FOLDER,CONTENT`.

    Before the check of free space if HOW starts with `early-`, else after it. Repaired before checkpoint REPAIRED.
    """
    *rest, trouble = arguments
    how, step, mended, folder, content = trouble.split(",")
    disk = Disk(Path(folder), Path(content))
    from train.loop.checkpoint.writer import CheckpointWriter

    look, begin = CheckpointWriter._check_room, CheckpointWriter.save
    number = 0

    def meet_trouble(early: bool) -> None:
        if number == int(step) and how.startswith("early-") == early and os.environ.get("RANK", "0") == "0":
            disk.make_trouble(how.removeprefix("early-"))

    def room(self: CheckpointWriter) -> None:
        meet_trouble(early=True)
        look(self)
        meet_trouble(early=False)

    def save(self: CheckpointWriter, now: int, *args: Any, **more: Any) -> bool:
        nonlocal number
        number = now
        if now == int(mended) and os.environ.get("RANK", "0") == "0":
            disk.mend(how)
        return begin(self, now, *args, **more)

    CheckpointWriter._check_room, CheckpointWriter.save = room, save
    return sft(*rest)


def with_a_full_disk_for_the_tokenizer(*arguments: str) -> int:
    """Train on a disk that is full when the tokenizer of checkpoint 2 is written: `FOLDER,CONTENT`."""
    *rest, folders = arguments
    disk = Disk(*map(Path, folders.split(",")))
    from transformers import PreTrainedTokenizerFast

    save = PreTrainedTokenizerFast._save_pretrained

    def save_full(self: PreTrainedTokenizerFast, save_directory: str, *args: Any, **more: Any) -> Any:
        if Path(save_directory).name == "checkpoint-2":
            disk.fill(room=0)
        return save(self, save_directory, *args, **more)

    PreTrainedTokenizerFast._save_pretrained = save_full
    return sft(*rest)


def test_a_disk_that_is_full_at_the_tokenizer_ends_a_run_with_an_error(
    recipe_of: Callable[..., Path], disk: Disk, tmp_path: Path
) -> None:
    """tokenizers raises a bare Exception."""
    run = disk.folder / "run"
    recipe = recipe_of(ALONE, run, tmp_path / "recipe.yaml")
    job = with_a_full_disk_for_the_tokenizer
    outcome = start(ALONE, recipe, tmp_path / "logs", f"{disk.folder},{disk.content}", job=job)
    assert outcome.exit_codes == [2]
    output = outcome.output[0]
    assert (
        f"error: output_dir: {run / 'checkpoint-2'} couldn't be written: No space left on device. checkpoint-1"
        in output
    )
    assert "Traceback" not in output
    assert whole(run) == [1]


ENDED = [
    (ALONE, "early-full-300000", " MiB are free, the last one needed "),
    (ALONE, "full-1100000", "No space left on device"),  # in the optimizer
    (DDP, "read-only", "Read-only file system"),
    (ZERO3, "full-1100000", "No space left on device"),  # in the pieces of the optimizer
    (ZERO3, "gone", "No such file or directory"),
]


@pytest.mark.parametrize(("kind", "how", "said"), ENDED, ids=[f"{kind.name}-{how}" for kind, how, _ in ENDED])
def test_a_run_whose_checkpoint_cannot_be_written_ends_and_resumes_once_it_can(
    kind: Kind,
    how: str,
    said: str,
    recipe_of: Callable[..., Path],
    untouched: Callable[[Kind], Path],
    disk: Disk,
    tmp_path: Path,
) -> None:
    run = disk.folder / "run"
    recipe = recipe_of(kind, run, tmp_path / "recipe.yaml")
    outcome = start(kind, recipe, tmp_path / "logs", trouble(disk, how, 2, 0), job=with_trouble_at)
    assert outcome.exit_codes == [2] * kind.processes
    text = "".join(outcome.output)
    assert text.count("error: ") == 1
    assert f"error: output_dir: {run / 'checkpoint-2'} couldn't be written: " in text
    assert said in text
    assert "Traceback" not in text
    if how == "gone":
        assert list(disk.folder.iterdir()) == []  # nothing was written to the disk below
    else:
        assert "checkpoint-1 is untouched. Free some space" in text
    assert whole(disk.content / "run") == [1]
    disk.mend(how)
    assert not (run / "unfinished").exists() or how in ("gone", "read-only")
    outcome = start(kind, recipe, tmp_path / "again").succeeded()
    assert f"resuming from {run / 'checkpoint-1'}" in outcome.output[0]
    assert_same_model(run, untouched(kind))
    assert whole(run) == [1, 2, 3, 4]
    assert not (run / "unfinished").exists()


GONE_ON = [(ALONE, "gone"), (ALONE, "read-only"), (DDP, "full-1100000"), (ZERO3, "full-300000"), (ZERO3, "full-900000")]


@pytest.mark.parametrize(("kind", "how"), GONE_ON, ids=[f"{kind.name}-{how}" for kind, how in GONE_ON])
def test_on_error_warn_continues_training_and_saves_once_it_can(
    kind: Kind,
    how: str,
    recipe_of: Callable[..., Path],
    untouched: Callable[[Kind], Path],
    disk: Disk,
    tmp_path: Path,
) -> None:
    run = disk.folder / "run"
    recipe = recipe_of(kind, run, tmp_path / "recipe.yaml", save={"on_error": "warn"})
    outcome = start(kind, recipe, tmp_path / "logs", trouble(disk, how, 2, 3), job=with_trouble_at).succeeded()
    assert outcome.output[0].count("warning: output_dir: ") == 1
    assert f"{run / 'checkpoint-2'} couldn't be written: " in outcome.output[0]
    assert "Training continues (save.on_error: warn)" in outcome.output[0]
    assert whole(run) == [1, 3, 4]
    assert_same_model(run, untouched(kind))
    assert not (run / "unfinished").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_the_best_model_is_the_best_saved_one(recipe_of: Callable[..., Path], disk: Disk, tmp_path: Path) -> None:
    """At a learning rate that ruins the model the first evaluation is the best, and its checkpoint can't be written."""
    training = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 1}
    data = {"validation": 0.3}
    recipe = recipe_of(
        ALONE,
        disk.folder / "run",
        tmp_path / "recipe.yaml",
        save={"on_error": "warn"},
        training={**training, "load_best_model_at_end": True, "save_total_limit": 1},
        data=data,
    )
    started = start(ALONE, recipe, tmp_path / "logs", trouble(disk, "full-300000", 1, 2), job=with_trouble_at)
    assert "warning: the model of step 1 was the best by loss" in started.succeeded().output[0]
    run = disk.folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert min(losses, key=losses.__getitem__) == 1
    del losses[1]
    best = min(losses, key=losses.__getitem__)
    assert lines[-1]["loaded_step"] == best
    assert_same_model(run, run / f"checkpoint-{best}")


def damaged_otherwise(run: Path, kind: Kind) -> dict[int, str]:
    """Damage all checkpoints but the first, each in another way; return the message for each."""
    weights = "adapter_model.safetensors" if kind.adapter else "model.safetensors"
    state = "optimizer.pt"
    if kind.config:
        state = str(next((run / "checkpoint-4").glob("global_step*/*zero_pp_rank_1_*optim_states.pt")).name)
    (run / "checkpoint-4" / "rng_state_1.pth").unlink()
    piece = next((run / "checkpoint-3").rglob(state))
    content = bytearray(piece.read_bytes())
    content[len(content) // 2] ^= 1
    piece.write_bytes(content)
    (run / "checkpoint-2" / weights).write_bytes(b"")
    return {
        4: f"{run / 'checkpoint-4' / 'rng_state_1.pth'} is missing",
        3: f"{piece} is damaged",
        2: f"{weights} is damaged",
    }


@pytest.mark.parametrize("kind", [DDP, ZERO3, ZERO3_LORA], ids=lambda kind: kind.name)
def test_damaged_checkpoints_are_skipped_by_name_for_the_one_before_them(
    kind: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(untouched(kind), run)
    (run / ("adapter_model.safetensors" if kind.adapter else "model.safetensors")).unlink()
    expected = damaged_otherwise(run, kind)
    recipe = recipe_of(kind, run, tmp_path / "recipe.yaml")
    outcome = start(kind, recipe, tmp_path / "logs").succeeded()
    for said in expected.values():
        assert said in outcome.output[0]
    assert f"resuming from {run / 'checkpoint-1'}" in outcome.output[0]
    assert_same_model(run, untouched(kind))
    assert sorted(path.name for path in (run / "set-aside-1").iterdir()) == [f"checkpoint-{step}" for step in (2, 3, 4)]
    assert whole(run) == [1, 2, 3, 4]


@pytest.mark.parametrize(("written", "launched"), [(DDP, ZERO3), (ZERO3, DDP)], ids=lambda kind: kind.name)
def test_a_checkpoint_of_another_distribution_is_refused(
    written: Kind, launched: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(written, tmp_path / "run", tmp_path / "recipe.yaml")
    checkpoint = untouched(written) / "checkpoint-2"
    outcome = start(launched, recipe, tmp_path / "logs", "--resume", str(checkpoint))
    assert outcome.exit_codes == [2, 2]
    names = {DDP: "one process or DDP", ZERO3: "DeepSpeed ZeRO-3"}
    expected = f"error: --resume: {checkpoint} was written under {names[written]}, and this run is launched as {names[launched]}"
    assert expected in outcome.output[0]
    assert "Traceback" not in "".join(outcome.output)


def sft_with_rank_1_behind(*arguments: str) -> int:
    """Run train/sft.py while rank 1 is still joining the group when rank 0 raises the error."""
    from torch.distributed.distributed_c10d import _get_default_store

    from train.loop.checkpoint import resume

    check = resume.check_distribution

    def check_late(*given: Any) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(3)
            _get_default_store().add("still here", 1)
        check(*given)

    resume.check_distribution = check_late
    return sft(*arguments)


def test_an_error_on_all_ranks_ends_none_while_another_is_still_joining(
    recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(ZERO3, tmp_path / "run", tmp_path / "recipe.yaml")
    checkpoint = untouched(ZERO3) / "checkpoint-2"
    job = sft_with_rank_1_behind
    outcome = start(DDP, recipe, tmp_path / "logs", "--resume", str(checkpoint), job=job)
    assert outcome.exit_codes == [2, 2]
    assert "error: --resume" in outcome.output[0]
    assert "Traceback" not in "".join(outcome.output)
