"""Output folder of a run: names of its files, checks of an existing folder, creation and lock."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.samples.evaluator import FILE as SAMPLES_FILE
from train.storage.file_lock import LockHeldError, acquire_lock
from train.system_gain.evaluator import FILE as GAIN_FILE

LOCK = ".lock"
OUTCOME = "outcome.json"
"""The outcome of the last run."""
ATTEMPTS = "attempts.jsonl"
"""A line when an attempt begins, and one when it ends; one that was killed has no second line."""
STAGING = "unfinished"
"""Folder of a checkpoint until it is complete."""
REFERENCE = "reference.npz"
"""The reference's log-probabilities of the pairs of a run with DPO."""
SUSPECTS = "suspects.jsonl"
"""A JSON object for each step that a guard reported."""
CARD = "README.md"
CARD_MARK = "fine-tuned with janus-sft by this recipe:"
"""Text of every model card that a run writes, and of no other README.md."""
_RUN_FILES = (
    *(LOCK, ATTEMPTS, OUTCOME, REFERENCE, SUSPECTS, GAIN_FILE, SAMPLES_FILE),
    *("metrics.jsonl", "report.md", "loss.png", "system_gain.png", "followed.png"),
)
"""Files that a run writes beside the model; `claim_output_dir` writes recipe.yaml."""
_MODELS = ("model.safetensors", "pytorch_model.bin")


def output_dir_conflicts(recipe: Recipe) -> Iterator[str]:
    """Yield errors for files in output_dir that a run must not write beside. Writes nothing."""
    folder = Path(recipe.output_dir)
    if folder.is_dir() and Path(recipe.model.name_or_path).resolve() == folder.resolve():
        yield "output_dir: this is the folder of model.name_or_path, which would be overwritten. Name another folder."
    if recipe.adapter is None and (folder / "adapter_config.json").is_file():
        yield (
            f"output_dir: {folder} holds an adapter, which would be applied to the model that this run saves beside it."
            " Name another folder, or move the adapter away."
        )
    models = [folder / f"{name}{index}" for name in _MODELS for index in ("", ".index.json")]
    if recipe.adapter is not None and any(path.is_file() for path in models):
        yield (
            f"output_dir: {folder} holds a model, to which the adapter that this run saves beside it would be applied. "
            "Name another folder, or move the model away."
        )
    mirror = recipe.save.mirror_dir
    if mirror is not None and Path(mirror).resolve() == folder.resolve():
        yield "save.mirror_dir: this is output_dir; copies belong on a second disk. Name another folder, or null."


def is_foreign_card(path: Path) -> bool:
    """Return whether there is a README.md that is not a model card of a run."""
    return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace")


def unwritable_files(recipe: Recipe, names: Collection[str]) -> Iterator[str]:
    """Yield an error for each file of a run that can't be written into output_dir.

    `names`: files of the finished model; those that every run writes are added.
    """
    for name in sorted({*names, *_RUN_FILES}):
        path = Path(recipe.output_dir, name)
        if path.is_dir():
            yield f"output_dir: {path} is a folder, and the run writes a file there. Move it, or name another folder."
        elif name == CARD and os.access(path, os.R_OK) and is_foreign_card(path):
            continue  # it is kept
        elif path.exists() and not os.access(path, os.W_OK):
            yield f"output_dir: {path} can't be written. Change its permissions, or name another folder."
    staging_dir = Path(recipe.output_dir, STAGING)
    if staging_dir.exists() and not staging_dir.is_dir():
        yield f"output_dir: {staging_dir} is a file, and the run needs a folder there. Move it, or name another folder."


def claim_output_dir(recipe: Recipe) -> Path:
    """Create the folder of a run with the resolved recipe in it, and return it.

    Raises UserError if it can't be written or has conflicting files: before training, not after it.
    """
    folder = Path(recipe.output_dir)
    for conflict in output_dir_conflicts(recipe):
        raise UserError(conflict)
    try:
        if is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: {folder} can't be written: {error.strerror}. Name another folder.") from error
    return folder


def lock_output_dir(output_dir: str) -> TextIO | None:
    """Create and lock the folder of a run; the lock is held while the returned file is open. None on other ranks.

    Raises UserError if another run holds the lock, or if the folder can't be written.
    """
    if not is_first_rank():
        return None
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        return acquire_lock(Path(output_dir, LOCK))
    except LockHeldError as holder:
        raise UserError(
            f"output_dir: another run is writing to {output_dir} ({holder}). Wait for it to finish, stop it, or name "
            "another folder."
        ) from holder
    except OSError as error:
        path = Path(output_dir, LOCK) if isinstance(error, IsADirectoryError) else output_dir
        raise UserError(f"output_dir: {path} can't be written: {error.strerror}. Name another folder.") from error
