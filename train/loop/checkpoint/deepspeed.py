"""DeepSpeed's checkpoints on another number of processes: made whole (its universal checkpoint), then dealt out anew.

A ZeRO checkpoint holds a piece of the optimizer for each process that wrote it, and only as many can load it. The
converter that comes with DeepSpeed (ds_to_universal) puts the pieces of each weight together, bit by bit; engines that
load the result cut it for themselves. One process converts, the others wait at a file lock and not in a collective, so
no watchdog of a process group can kill them.
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
_STATES = ("exp_avg", "exp_avg_sq")
"""What the converter looks for in an optimizer: Adam's."""


def is_universal(folder: Path) -> bool:
    """Whether a folder holds what `universal_form` makes."""
    return (folder / _LATEST).is_file()


def universal_form(checkpoint: Checkpoint, output_dir: str, processes: int) -> Path:
    """The checkpoint in the form that any number of processes can load: a folder below `output_dir`.

    All processes call it; the first to come makes it, and one that is there already is taken. Raises UserError where
    its optimizer has states other than Adam's, or where it can't be written.
    """
    folder = Path(output_dir) / _FOLDER / checkpoint.folder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if (read_manifest(folder) or {}).get("digest") == checkpoint.manifest["digest"]:
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            aside = folder.with_suffix(".unfinished")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                _convert(checkpoint, aside, processes)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except (OSError, RuntimeError) as fault:  # PyTorch's of a full disk
        why = fault.strerror if isinstance(fault, OSError) else " ".join(str(fault).split())[:500]
        raise UserError(
            f"--resume: {checkpoint.folder} couldn't be dealt out to {processes} processes in {folder.parent}: {why}. "
            f"Make room there, or go on with {checkpoint.manifest['processes']} processes."
        ) from fault
    return folder


def forget(output_dir: str) -> None:
    """Delete what was made there."""
    shutil.rmtree(Path(output_dir) / _FOLDER, ignore_errors=True)


def expect(deepspeed_plugin: Any) -> None:
    """Have the engine that is made next load the universal form. Call `loaded` once it has."""
    deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True


def loaded(engine: Any, folder: Path) -> None:
    """Mend what the loader left wrong, and have the engine load ordinary checkpoints from now on."""
    if is_universal(folder):
        _restore(engine, folder)
        engine._config.load_universal_checkpoint = False


@contextmanager
def loading(engine: Any, folder: Path) -> Iterator[None]:
    """Have a DeepSpeed engine load `folder` in the form that it has, inside the block.

    A run that went on from the universal form may load either at its end: the best checkpoint.
    """
    engine._config.load_universal_checkpoint = is_universal(folder)
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _restore(engine: Any, folder: Path) -> None:
    """Give each group of parameters its own settings and its own count of steps again.

    Under ZeRO-3 DeepSpeed 0.19 gives all groups the settings of the first (transformers makes two, with and without
    weight decay) and one tensor that counts the steps of all, so each step of Adam counts as many as there are groups.
    """
    tag = (folder / _LATEST).read_text(encoding="utf-8").strip()
    saved = torch.load(folder / tag / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    optimizer = engine.optimizer.optimizer
    for group, settings in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: value for key, value in settings.items() if key != "params"}
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _convert(checkpoint: Checkpoint, into: Path, processes: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    source = next(checkpoint.folder.glob("global_step*"))
    pieces = [source / name for name in sorted(os.listdir(source)) if name.endswith("optim_states.pt")]
    _check_optimizer(checkpoint, pieces[0])
    states = sum(piece.stat().st_size for piece in pieces)
    into.mkdir()
    free = shutil.disk_usage(into).free
    if free < 2.1 * states:  # the pieces of each weight, and what is put together from them
        raise OSError(0, f"it takes {2.1 * states / 2**30:,.2f} GiB for a while, and {free / 2**30:,.2f} are free")
    were = checkpoint.manifest["processes"]
    print(
        f"dealing out {checkpoint.folder.name} of {were} processes to {processes}: {states / 2**30:,.2f} GiB",
        flush=True,
    )
    for path in checkpoint.folder.iterdir():  # scheduler, random numbers, figures: what isn't DeepSpeed's
        if path.is_file() and path.suffix != ".safetensors" and path.name != COMPLETE:
            shutil.copyfile(path, into / path.name)
    universal = into / f"{source.name}_universal"
    universal.mkdir()
    workers = min(8, os.cpu_count() or 1)
    settings = Namespace(
        input_folder=str(source), output_folder=str(universal), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    if states > 2**30:  # below, the start of processes takes longer than the work
        settings.num_extract_workers = settings.num_merge_workers = workers
    with open(os.devnull, "w") as nowhere:
        bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(nowhere)
        with redirect_stdout(nowhere), bars:
            ds_to_universal.main(settings)
    shutil.copyfile(checkpoint.folder / COMPLETE, into / COMPLETE)


def _check_optimizer(checkpoint: Checkpoint, piece: Path) -> None:
    state = torch.load(piece, map_location="cpu", weights_only=False, mmap=_is_zip(piece))["optimizer_state_dict"]
    inner = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
    groups = inner.get("state", {}) if isinstance(inner, dict) else {}
    for group in groups.values():
        lacking = [name for name in _STATES if name not in group]
        if lacking:
            raise UserError(
                f"--resume: {checkpoint.folder} was written by {checkpoint.manifest['processes']} processes, and the "
                f"states of its optimizer ({', '.join(map(str, group))}) can't be dealt out to another number of them: "
                f"that takes those of Adam in full precision. Go on with {checkpoint.manifest['processes']} processes."
            )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class _Kept:
    """In the place of an engine's writer: what it is to write is kept, by reference and not as a copy."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.files: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((state_dict, path))


@contextmanager
def written_last(engine: Any) -> Iterator[None]:
    """Have the files that a DeepSpeed engine saves inside the block written at its end."""
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = kept = _Kept(writer)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
    while kept.files:
        state, path = kept.files.pop(0)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        writer.save(state, path)
        del state
