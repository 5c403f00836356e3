"""Runs on small disks that break: full, read-only or lost. Disks are tmpfs mounts, so they need root on Linux."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LaunchResult, launch, sft
from safetensors.torch import load_file
from small_runs import Kind, once, write_recipe, write_rows

from train.loop.checkpoint.manifest import COMPLETE

ALONE = Kind("alone")
DDP = Kind("ddp", 2)
ZERO3 = Kind("zero3", 2, "zero3.yaml")
STEPS = 4
PATIENCE = 100
"""Seconds after which a launch counts as one that hangs; it takes a few."""


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
    """Run a command. Raises CalledProcessError if it fails."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def mounted_disk(parent: Path) -> Iterator[Disk]:
    """Mount a disk of 12 MiB below `parent` for the block. Skips the test without the permission."""
    disk = Disk(parent / "disk", parent / "content")
    disk.folder.mkdir()
    disk.content.mkdir()
    try:
        run_command("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk.content)
        run_command("mount", "--bind", disk.content, disk.folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a disk")
    try:
        yield disk
    finally:
        for folder in (disk.folder, disk.folder, disk.content):
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def recipe_writer(folder: Path, model: Path) -> Callable[..., Path]:
    """Return a function that writes the recipe of a kind of run with a checkpoint at each step; rows are in `folder`."""
    rows = write_rows(folder / "rows.jsonl", 32, seed=29)

    def write(kind: Kind, run: Path, recipe: Path, **sections: Any) -> Path:
        data = {"cache_dir": str(folder / "cache"), **sections.pop("data", {})}
        training = {
            **{"gradient_accumulation_steps": 4 // kind.processes, "max_steps": STEPS, "save_steps": 1},
            **sections.pop("training", {}),
        }
        adapter = {"r": 4} if kind.adapter else None
        return write_recipe(recipe, model, rows, run, data=data, training=training, adapter=adapter, **sections)

    return write


def untouched_runs(recipe_of: Callable[..., Path], temporary_folders: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Return a function that trains an uninterrupted run of a kind once: its folder with all checkpoints."""

    def train(kind: Kind) -> Path:
        folder = temporary_folders.mktemp(kind.name)
        start(kind, recipe_of(kind, folder / "run", folder / "recipe.yaml"), folder / "logs").succeeded()
        return folder / "run"

    return once(train)


def start(kind: Kind, recipe: Path, logs: Path, *options: str, job: Callable[..., int | None] = sft) -> LaunchResult:
    """Run the recipe on the processes of a kind."""
    return launch(kind.processes, kind.config, "--recipe", recipe, *options, logs=logs, job=job, timeout=PATIENCE)


def trouble(disk: Disk, how: str, step: int, mended: int) -> str:
    """Return the argument of a job whose disk breaks at a step and is repaired before another one."""
    return f"{how},{step},{mended},{disk.folder},{disk.content}"


def whole(run: Path) -> list[int]:
    """Return the steps of complete checkpoints."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in run.glob(f"checkpoint-*/{COMPLETE}"))


def assert_same_model(run: Path, other: Path) -> None:
    """Assert that the saved weights are bit-identical."""
    name = "adapter_model.safetensors" if (other / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(run / name), load_file(other / name)
    assert weights.keys() == others.keys()
    assert [key for key in weights if not torch.equal(weights[key], others[key])] == []
