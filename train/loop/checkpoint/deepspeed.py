"""DeepSpeed's checkpoints: loaded by another number of processes, and written where no process waits for another.

A ZeRO checkpoint holds a partition of the optimizer for each process that wrote it, and only as many processes can load
it. DeepSpeed's converter (ds_to_universal) joins the partitions of each weight, bit by bit, into a universal
checkpoint, which engines partition again as they load it. One process converts while the others wait at a file lock:
in a collective, the watchdog of the process group would kill them.
"""

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from train.errors import UserError
from train.loop.checkpoint.manifest import COMPLETE, Checkpoint, read_manifest

_FOLDER = "universal"
_LATEST = "latest_universal"
_ADAM_STATES = ("exp_avg", "exp_avg_sq")
"""States that the converter expects in an optimizer."""


def is_universal(folder: Path) -> bool:
    """Return whether a folder holds a universal checkpoint."""
    return (folder / _LATEST).is_file()


def convert_to_universal(checkpoint: Checkpoint, output_dir: str, processes: int) -> Path:
    """Return a folder below `output_dir` with the checkpoint in the form that any number of processes can load.

    All processes call it; the first one converts, the others use the result. Raises UserError if the optimizer has
    other states than Adam's, or if the result can't be written.
    """
    folder = Path(output_dir) / _FOLDER / checkpoint.folder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if (read_manifest(folder) or {}).get("digest") == checkpoint.manifest["digest"]:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            staging_dir = folder.with_suffix(".unfinished")
            shutil.rmtree(staging_dir, ignore_errors=True)
            try:
                _convert(checkpoint, staging_dir, processes)
                staging_dir.rename(folder)
            finally:
                shutil.rmtree(staging_dir, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's of a full disk
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:500]
        raise UserError(
            f"--resume: {checkpoint.folder} couldn't be converted for {processes} processes in {folder.parent}: "
            f"{reason}. Make room there, or resume with {checkpoint.manifest['processes']} processes."
        ) from error
    return folder


def remove_universal(output_dir: str) -> None:
    """Delete the universal checkpoints of a run."""
    shutil.rmtree(Path(output_dir) / _FOLDER, ignore_errors=True)


def expect_universal(deepspeed_plugin: Any) -> None:
    """Make the next engine load a universal checkpoint. Call `finish_loading` afterwards."""
    deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True


def finish_loading(engine: Any, folder: Path) -> None:
    """Repair what the loader of universal checkpoints left wrong, and make the engine load ordinary ones again."""
    if is_universal(folder):
        _restore_groups(engine, folder)
        engine._config.load_universal_checkpoint = False


@contextmanager
def format_of(engine: Any, folder: Path) -> Iterator[None]:
    """Make an engine load `folder` in the format that it has, inside the block.

    A run that resumed from a universal checkpoint may load either at its end: the best one.
    """
    engine._config.load_universal_checkpoint = is_universal(folder)
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _restore_groups(engine: Any, folder: Path) -> None:
    """Restore the settings and the step count of each parameter group.

    Under ZeRO-3 DeepSpeed 0.19 gives all groups the settings of the first (transformers makes two, with and without
    weight decay) and a common step count, so that each step of Adam would count once per group.
    """
    tag = (folder / _LATEST).read_text(encoding="utf-8").strip()
    saved = torch.load(folder / tag / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    optimizer = engine.optimizer.optimizer
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: value for key, value in settings.items() if key != "params"}
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _convert(checkpoint: Checkpoint, target: Path, processes: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    source = next(checkpoint.folder.glob("global_step*"))
    partitions = [source / name for name in sorted(os.listdir(source)) if name.endswith("optim_states.pt")]
    _check_optimizer(checkpoint, partitions[0])
    states = sum(partition.stat().st_size for partition in partitions)
    target.mkdir()
    free = shutil.disk_usage(target).free
    if free < 2.1 * states:  # the partitions of each weight, and their sum
        raise OSError(0, f"it needs {2.1 * states / 2**30:,.2f} GiB temporarily, and {free / 2**30:,.2f} are free")
    print(
        f"converting {checkpoint.folder.name} of {checkpoint.manifest['processes']} processes for {processes}: "
        f"{states / 2**30:,.2f} GiB",
        flush=True,
    )
    for path in checkpoint.folder.iterdir():  # schedule, random states, figures: all that isn't DeepSpeed's
        if path.is_file() and path.suffix != ".safetensors" and path.name != COMPLETE:
            shutil.copyfile(path, target / path.name)
    universal = target / f"{source.name}_universal"
    universal.mkdir()
    workers = min(8, os.cpu_count() or 1)
    settings = Namespace(
        input_folder=str(source), output_folder=str(universal), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    if states > 2**30:  # below, starting processes takes longer than the work
        settings.num_extract_workers = settings.num_merge_workers = workers
    with open(os.devnull, "w") as null:
        bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(null)
        with redirect_stdout(null), bars:
            ds_to_universal.main(settings)
    shutil.copyfile(checkpoint.folder / COMPLETE, target / COMPLETE)


def _check_optimizer(checkpoint: Checkpoint, partition: Path) -> None:
    """Raise UserError if the optimizer has other states than Adam's."""
    content = torch.load(partition, map_location="cpu", weights_only=False, mmap=_is_zip(partition))
    state = content["optimizer_state_dict"]
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    groups = inner.get("state", {}) if isinstance(inner, dict) else {}
    for group in groups.values():
        if any(name not in group for name in _ADAM_STATES):
            raise UserError(
                f"--resume: {checkpoint.folder} was written by {checkpoint.manifest['processes']} processes, and the "
                f"states of its optimizer ({', '.join(map(str, group))}) can't be converted for another number: only "
                f"Adam's in full precision can. Resume with {checkpoint.manifest['processes']} processes."
            )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class _DeferringEngine:
    """A checkpoint engine that keeps what it is to write, by reference and not as a copy."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.files: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((state_dict, path))


@contextmanager
def deferred_writes(engine: Any) -> Iterator[None]:
    """Write the files that a DeepSpeed engine saves inside the block when it ends.

    Inside, processes wait for each other: one whose disk is full would leave the others waiting.
    """
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = deferring = _DeferringEngine(writer)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
    while deferring.files:
        state, path = deferring.files.pop(0)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        writer.save(state, path)
        del state
