"""Checks of a run besides its rows: folders, tracking and settings that would fail after minutes of work."""

import netrc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from train.errors import UserError
from train.loop.output_dir import output_dir_conflicts
from train.loop.time_limit import time_conflicts
from train.loop.tracking import tracker_names
from train.ranks import deepspeed_launch_error, parallelism_error
from train.recipe import Recipe
from train.recipe.schedule import data_parallel, sharing_error
from train.recipe.sft_config import with_defaults


def find_run_errors(recipe: Recipe, sequences: int, processes: int) -> list[str]:
    """Return each error of a run as a sentence or two, as it stands after `error:`.

    `sequences`: sequences of an epoch. Folders are tested by writing, and left as they were.
    """
    saving = [*_output_dir(Path(recipe.output_dir), recipe), *_mirror_dir(recipe), *time_conflicts(recipe.save)]
    return [*saving, *_tracking(recipe), *_training(recipe, sequences, processes)]


def _output_dir(folder: Path, recipe: Recipe) -> Iterator[str]:
    """Yield what `claim_output_dir` would refuse, without writing."""
    yield from output_dir_conflicts(recipe)
    recipe_file = folder / "recipe.yaml"
    try:
        _try_writing(folder)
        if recipe_file.exists():
            with recipe_file.open("a"):
                pass
    except OSError as error:
        yield f"output_dir: {folder} can't be written: {error.strerror}. Name another folder."


def _mirror_dir(recipe: Recipe) -> Iterator[str]:
    """Yield what would be a warning hours later, when the first checkpoint is copied."""
    if recipe.save.mirror_dir is None:
        return
    folder = Path(recipe.save.mirror_dir)
    try:
        _try_writing(folder)
    except OSError as error:
        yield f"save.mirror_dir: {folder} can't be written: {error.strerror}. Name another folder."


def _try_writing(folder: Path) -> None:
    """Raise OSError if `folder`, or the nearest parent of it that exists, can't be written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with tempfile.TemporaryFile(dir=nearest):
        pass


def _tracking(recipe: Recipe) -> Iterator[str]:
    try:
        tracker_names(recipe.tracking)
    except UserError as error:
        yield str(error)
    wandb = recipe.tracking.wandb
    if wandb is not None and wandb.mode == "online" and not _has_key():
        yield (
            "tracking.wandb: there is no key for it. Set WANDB_API_KEY in the environment, or write "
            "`tracking.wandb.mode: offline`."
        )


def _has_key() -> bool:
    """Return whether wandb finds a key here; the key itself isn't read."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    netrc_file = os.environ.get("NETRC")
    for file in [Path(netrc_file)] if netrc_file else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if host in netrc.netrc(file.expanduser()).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _training(recipe: Recipe, sequences: int, processes: int) -> Iterator[str]:
    settings = with_defaults(recipe.training)
    batch = settings["per_device_train_batch_size"] * data_parallel(processes, recipe.model.sequence_parallel)
    if settings["dataloader_drop_last"] and 0 < sequences < batch:
        yield (
            f"training.dataloader_drop_last: no batch is full, so nothing would be trained: {sequences:,} sequences, "
            f"and a batch of all processes takes {batch:,}. Write false, or a smaller "
            "training.per_device_train_batch_size."
        )
    if processes == 1 and (error := deepspeed_launch_error(settings["deepspeed"], os.environ)):
        yield error
    if error := parallelism_error(os.environ):
        yield error
    if processes > 1 and (error := sharing_error(recipe, processes)):
        yield error
    if settings["fsdp"] and processes == 1:
        yield "training.fsdp: it takes several processes, and this is one. Start them with `accelerate launch`."
