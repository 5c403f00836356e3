"""Checkpoints on full, read-only and lost disks, and damaged checkpoints, on several processes.

Full disks are small tmpfs mounts, so these tests run as root on Linux.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LaunchResult, launch, sft
from safetensors.torch import load_file
from small_runs import Kind, once, write_recipe, write_rows

from train.loop.checkpoint.manifest import COMPLETE

pytest.importorskip("deepspeed")

STEPS = 4
PATIENCE = 100
"""Seconds after which a launch counts as one that hangs; it takes a few."""


ALONE = Kind("alone")
DDP = Kind("ddp", 2)
ZERO3 = Kind("zero3", 2, "zero3.yaml")
ZERO3_LORA = Kind("zero3-lora", 2, "zero3.yaml", adapter=True)


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("rows")
    rows = write_rows(folder / "rows.jsonl", 32, seed=29)

    def write(kind: Kind, run: Path, recipe: Path, **sections: Any) -> Path:
        data = {"cache_dir": str(folder / "cache"), **sections.pop("data", {})}
        training = {
            **{"gradient_accumulation_steps": 4 // kind.processes, "max_steps": STEPS, "save_steps": 1},
            **sections.pop("training", {}),
        }
        adapter = {"r": 4} if kind.adapter else None
        return write_recipe(recipe, tiny_model, rows, run, data=data, training=training, adapter=adapter, **sections)

    return write


@pytest.fixture(scope="module")
def untouched(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Return a function that trains an uninterrupted run of a kind once: its folder with all checkpoints."""

    def train(kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp(kind.name)
        start(kind, recipe_of(kind, folder / "run", folder / "recipe.yaml"), folder / "logs").succeeded()
        return folder / "run"

    return once(train)


@dataclass
class Disk:
    """A small disk that can be filled, detached, made read-only, and repaired."""

    folder: Path
    content: Path

    def fill(self, *, room: int) -> None:
        with (self.folder / "ballast").open("wb") as ballast:
            ballast.write(bytes(max(shutil.disk_usage(self.folder).free - room, 0)))

    def take_away(self) -> None:
        run_command("umount", "-l", self.folder)

    def make_read_only(self) -> None:
        """Make files read-only that are opened from now on, as a broken disk does."""
        run_command("mount", "--bind", self.content, self.folder)
        run_command("mount", "-o", "remount,bind,ro", self.folder)

    def mend(self, how: str) -> None:
        (self.content / "ballast").unlink(missing_ok=True)
        if how == "read-only":
            run_command("umount", self.folder)
        elif how == "gone":
            run_command("mount", "--bind", self.content, self.folder)

    def make_trouble(self, how: str) -> None:
        """Break the disk: `full-BYTES` (free bytes), `read-only` or `gone`."""
        if how == "read-only":
            self.make_read_only()
        elif how == "gone":
            self.take_away()
        else:
            self.fill(room=int(how.removeprefix("full-")))


def run_command(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", tmp_path / "content")
    disk.folder.mkdir()
    disk.content.mkdir()
    try:
        run_command("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk.content)
        run_command("mount", "--bind", disk.content, disk.folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a disk")
    yield disk
    for folder in (disk.folder, disk.folder, disk.content):
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def start(kind: Kind, recipe: Path, logs: Path, *options: str, job: Callable[..., int | None] = sft) -> LaunchResult:
    return launch(kind.processes, kind.config, "--recipe", recipe, *options, logs=logs, job=job, timeout=PATIENCE)


def whole(run: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in run.glob(f"checkpoint-*/{COMPLETE}"))


def assert_same_model(run: Path, other: Path) -> None:
    name = "adapter_model.safetensors" if (other / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(run / name), load_file(other / name)
    assert weights.keys() == others.keys()
    assert [key for key in weights if not torch.equal(weights[key], others[key])] == []


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


def trouble(disk: Disk, how: str, step: int, mended: int) -> str:
    return f"{how},{step},{mended},{disk.folder},{disk.content}"


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
