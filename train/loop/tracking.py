"""Trackers of a run: Weights & Biases and TensorBoard, where the recipe names them."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe, TrackingSection


def integrations(tracking: TrackingSection) -> list[str]:
    """Names under which transformers knows the trackers. Raises UserError for one whose package is missing."""
    wanted = [name for name in ("wandb", "tensorboard") if getattr(tracking, name)]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.{name}: the package {name} is not installed. Install it with `pip install {name}`, or take "
                "the key out."
            )
    return wanted


@contextmanager
def tracked(recipe: Recipe, wandb_run: str | None = None) -> Iterator[None]:
    """Open the wandb run of the recipe on the first rank and close it on every path; name TensorBoard's folder.

    `wandb_run`: the id of the run that this one goes on from.

    Raises UserError where wandb can't be reached with the key that the environment holds.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output_dir) / "tensorboard")
    settings = recipe.tracking.wandb
    if settings is None or not is_first_rank():
        yield
        return
    import wandb

    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            **settings.model_dump(exclude_none=True),
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
            id=wandb_run,
            resume="allow" if wandb_run else None,
        )
    except wandb.errors.Error as fault:
        raise UserError(
            f"tracking.wandb: {' '.join(str(fault).split())} Set WANDB_API_KEY in the environment, or write "
            "`tracking.wandb.mode: offline`."
        ) from fault
    with run:
        yield
