"""TODO: train.loop.output_dir."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.storage.file_lock import LockHeldError, acquire_lock
from train.system_gain.evaluator import FILE as GAIN_FILE

LOCK = ".lock"
OUTCOME = "outcome.json"
"""How the last run there ended. Exit codes don't survive `accelerate launch`."""
ATTEMPTS = "attempts.jsonl"
"""A line as an attempt of the run begins, and one as it ends. One that was killed has no second line."""
ASIDE = "unfinished"
"""Folder of a checkpoint until it is complete."""
SUSPECTS = "suspects.jsonl"
"""A JSON object for each step that a guard reported."""
CARD = "README.md"
CARD_MARK = "fine-tuned with janus-sft by this recipe:"
"""Text of every model card that a run writes, and of no other README.md."""
_OF_THE_RUN = (
    *(LOCK, ATTEMPTS, OUTCOME, SUSPECTS, GAIN_FILE),
    *("metrics.jsonl", "report.md", "loss.png", "system_gain.png"),
)
"""Files that a run writes into output_dir beside the model; recipe.yaml, the first, is tried by others."""
_MODELS = ("model.safetensors", "pytorch_model.bin")


def output_dir_conflicts(recipe: Recipe) -> Iterator[str]:
    """What stands in the folder of the run and forbids it, in words; nothing is written."""
    folder = Path(recipe.output_dir)
    if folder.is_dir() and Path(recipe.model.name_or_path).resolve() == folder.resolve():
        yield "output_dir: that is the folder of model.name_or_path: it would be overwritten. Name another."
    if recipe.adapter is None and (folder / "adapter_config.json").is_file():
        yield (
            f"output_dir: {folder} holds an adapter, which would be applied to the model that this run saves beside it."
            " Name another folder, or take the adapter away."
        )
    models = [folder / f"{name}{index}" for name in _MODELS for index in ("", ".index.json")]
    if recipe.adapter is not None and any(path.is_file() for path in models):
        yield (
            f"output_dir: {folder} holds a model, to which the adapter that this run saves beside it would be applied. "
            "Name another folder, or take the model away."
        )
    mirror = recipe.save.mirror_dir
    if mirror is not None and Path(mirror).resolve() == folder.resolve():
        yield "save.mirror_dir: that is output_dir: copies go to a second disk. Name another folder, or null."


def is_card_of_others(path: Path) -> bool:
    """Return whether there is a README.md that is not a model card of a run."""
    return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace")


def unwritable_files(recipe: Recipe, names: Collection[str]) -> Iterator[str]:
    """Yield an error for each file of a run in output_dir that can't be written.

    `names`: the files of the finished model; those that every run writes are added.
    """
    for name in sorted({*names, *_OF_THE_RUN}):
        path = Path(recipe.output_dir, name)
        if path.is_dir():
            yield f"output_dir: {path} is a folder, and the run writes a file there. Move it, or name another folder."
        elif name == CARD and os.access(path, os.R_OK) and is_card_of_others(path):
            continue  # it stays
        elif path.exists() and not os.access(path, os.W_OK):
            yield f"output_dir: {path} can't be written. Change its permissions, or name another folder."
    aside = Path(recipe.output_dir, ASIDE)
    if aside.exists() and not aside.is_dir():
        yield f"output_dir: {aside} is a file, and the run makes a folder there. Move it, or name another folder."


def claim_output_dir(recipe: Recipe) -> Path:
    """The folder of the run, made if need be, with the resolved recipe in it.

    Raises UserError where it can't be written: known before hours of work, not after them.
    """
    folder = Path(recipe.output_dir)
    for conflict in output_dir_conflicts(recipe):
        raise UserError(conflict)
    try:
        if is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as fault:
        raise UserError(f"output_dir: {folder} can't be written: {fault.strerror}. Name another folder.") from fault
    return folder


def lock_output_dir(output_dir: str) -> TextIO | None:
    """Lock the folder of a run, which is made if need be, for as long as what this returns stays open.

    Raises UserError where another run is in it, or where it can't be written.
    """
    if not is_first_rank():
        return None
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        return acquire_lock(Path(output_dir, LOCK))
    except LockHeldError as holder:
        raise UserError(
            f"output_dir: another run is writing to {output_dir} ({holder}). Wait for its end, stop it, or name "
            "another folder."
        ) from holder
    except OSError as fault:
        path = Path(output_dir, LOCK) if isinstance(fault, IsADirectoryError) else output_dir
        raise UserError(f"output_dir: {path} can't be written: {fault.strerror}. Name another folder.") from fault
