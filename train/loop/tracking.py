"""Trackers of a run: Weights & Biases and TensorBoard, if the recipe names them."""

import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.ranks import is_first_rank
from train.recipe import Recipe, TrackingSection


def tracker_names(tracking: TrackingSection) -> list[str]:
    """Return the names of the recipe's trackers in transformers. Raises UserError if the package of one is missing."""
    names = [name for name in ("wandb", "tensorboard") if getattr(tracking, name)]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.{name}: the package {name} is not installed. Install it with `pip install {name}`, or "
                "remove the key."
            )
    return names


@contextmanager
def open_trackers(recipe: Recipe, wandb_run: str | None = None) -> Iterator[None]:
    """Keep the wandb run of the recipe open inside the block, on the first rank; set TensorBoard's folder.

    `wandb_run`: the id of the run that this one resumes. Raises UserError if wandb can't be reached with the key in the
    environment.
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
    except wandb.errors.Error as error:
        raise UserError(
            f"tracking.wandb: {' '.join(str(error).split())} Set WANDB_API_KEY in the environment, or write "
            "`tracking.wandb.mode: offline`."
        ) from error
    with run:
        yield


def log_samples(trackers: Iterable[Any], step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Log the samples of a step: a table in wandb, text in TensorBoard. `trackers`: the callbacks of the trainer."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    for tracker in trackers:
        if isinstance(tracker, WandbCallback):
            import wandb

            columns = ["step", "kind", "row", "turn", "messages", "answer", "verdict"]
            rows = [[_as_cell(sample[name]) for name in columns] for sample in samples]
            # transformers logs this key with all of its metrics, as the step that wandb shows them over
            wandb.log({"eval/samples": wandb.Table(columns, rows), "train/global_step": step})
        elif isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            text = "\n\n".join(f"```\n{json.dumps(sample, ensure_ascii=False, indent=1)}\n```" for sample in samples)
            tracker.tb_writer.add_text("eval/samples", text, step)


def _as_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
