"""What keeps a run from starting beside its rows: all that training would trip over after minutes of work."""

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
from train.ranks import deepspeed_launch_error
from train.recipe import Recipe
from train.recipe.sft_config import with_defaults


def run_faults(recipe: Recipe, sequences: int, processes: int) -> list[str]:
    """Each fault as a sentence or two, as it stands after `error:`. `sequences`: what an epoch trains.

    Nothing is left behind where a folder is tried.
    """
    saving = [*_output_dir(Path(recipe.output_dir), recipe), *_mirror_dir(recipe), *time_conflicts(recipe.save)]
    return [*saving, *_tracking(recipe), *_training(recipe, sequences, processes)]


def _output_dir(folder: Path, recipe: Recipe) -> Iterator[str]:
    """What `claim_output_dir` would refuse, without writing."""
    yield from output_dir_conflicts(recipe)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    written = folder / "recipe.yaml"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        if written.exists():
            with written.open("a"):
                pass
    except OSError as fault:
        yield f"output_dir: {folder} can't be written: {fault.strerror}. Name another folder."


def _mirror_dir(recipe: Recipe) -> Iterator[str]:
    """What would be a warning hours later, as the first checkpoint is copied."""
    if recipe.save.mirror_dir is None:
        return
    folder = Path(recipe.save.mirror_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as fault:
        yield f"save.mirror_dir: {folder} can't be written: {fault.strerror}. Name another folder."


def _tracking(recipe: Recipe) -> Iterator[str]:
    try:
        tracker_names(recipe.tracking)
    except UserError as fault:
        yield str(fault)
    wandb = recipe.tracking.wandb
    if wandb is not None and wandb.mode == "online" and not _has_key():
        yield (
            "tracking.wandb: there is no key for it. Set WANDB_API_KEY in the environment, or write "
            "`tracking.wandb.mode: offline`."
        )


def _has_key() -> bool:
    """Whether wandb finds a key here; no more than that is looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if host in netrc.netrc(file.expanduser()).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _training(recipe: Recipe, sequences: int, processes: int) -> Iterator[str]:
    settings = with_defaults(recipe.training)
    batch = settings["per_device_train_batch_size"] * processes
    if settings["dataloader_drop_last"] and 0 < sequences < batch:
        yield (
            f"training.dataloader_drop_last: no batch is full, so nothing would be trained: {sequences:,} sequences, "
            f"and a batch of all processes takes {batch:,}. Write false, or a smaller "
            "training.per_device_train_batch_size."
        )
    if processes == 1 and (fault := deepspeed_launch_error(settings["deepspeed"], os.environ)):
        yield fault
    if settings["fsdp"] and processes == 1:
        yield "training.fsdp: it takes several processes, and this is one. Start them with `accelerate launch`."
