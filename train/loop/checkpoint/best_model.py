"""Best model: the evaluated model that a run ends with, across lost checkpoints and resumed runs.

transformers records it in the trainer's state (`best_metric`, `best_global_step`, `best_model_checkpoint`). Every
method takes that state, as transformers replaces it when training begins.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from train.loop.checkpoint.fingerprint import RESUMABLE_CHANGES, changed_keys
from train.loop.checkpoint.manifest import Checkpoint, read_manifest
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.recipe.measurements import SECTIONS, is_only_reported

_SELECTION_KEYS = {
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.load_best_model_at_end",
}
_EVALUATION_SECTIONS = ("data.", "made.", "chat.", *SECTIONS)
"""Sections of keys that two evaluations must share for their metrics to be comparable."""


class BestModel:
    """The best model of a run."""

    def __init__(self, arguments: TrainingArguments, recipe: Recipe, run: Mapping[str, Any]) -> None:
        """Begin without a best model. `run`: fingerprint of recipe and data."""
        self._arguments, self._recipe, self._run = arguments, recipe, run
        self._saved: tuple[float | None, int | None, str | None] = (None, None, None)
        """Metric, step and folder of the best model when the last checkpoint was written."""
        self._lost: tuple[float, int] | None = None
        """Metric and step of the best model whose checkpoint couldn't be written."""

    def on_saved(self, state: TrainerState) -> None:
        """Note the best model of a checkpoint that was written."""
        self._saved = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def on_save_failed(self, state: TrainerState, step: int) -> None:
        """Go back to the previous best model if the checkpoint of `step`, which couldn't be written, was the best."""
        if state.best_metric is None or state.best_global_step != step:
            return
        if self._lost is None or self._is_better(state.best_metric, self._lost[0]):
            self._lost = state.best_metric, step
        state.best_metric, state.best_global_step, state.best_model_checkpoint = self._saved

    def is_in_memory(self, state: TrainerState) -> bool:
        """Return whether the best model has no checkpoint but is the last one. If so, note it in the state."""
        if not self._is_lost(state) or self._lost is None or self._lost[1] != state.global_step:
            return False
        state.best_metric, state.best_global_step = self._lost
        return True

    def warn_if_lost(self, state: TrainerState) -> None:
        """Warn, at the end of a run, that it doesn't end with its best model."""
        if not (self._arguments.load_best_model_at_end and self._is_lost(state) and self._lost and is_first_rank()):
            return
        metric, step = self._lost
        if step == state.global_step:
            return
        instead = (
            f"that of step {state.best_global_step} ({state.best_metric:.4f})"
            if state.best_global_step and state.best_metric is not None
            else "the last one, as none was saved before"
        )
        print(
            f"warning: the model of step {step} was the best by {self._arguments.metric_for_best_model} "
            f"({metric:.4f}), but its checkpoint couldn't be written: this run ends with {instead}.",
            flush=True,
        )

    def resume(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        """Keep the best model of a checkpoint's run if this run selects and evaluates as that one did.

        If the metric has changed, the best of the existing checkpoints is selected by the new one; if its value can't
        be compared with later ones, the search begins again.
        """
        changed = changed_keys(checkpoint.manifest["run"], self._run)
        metric = self._arguments.metric_for_best_model
        incomparable = [
            key
            for key in changed
            if key.startswith(_EVALUATION_SECTIONS)
            and key not in RESUMABLE_CHANGES
            and not is_only_reported(key, metric)
        ]
        if incomparable and state.best_global_step:
            _clear(state)
            if self._arguments.load_best_model_at_end and is_first_rank():
                print(
                    f"the search for the best model begins again at step {state.global_step}: earlier metrics can't be "
                    f"compared with later ones ({', '.join(incomparable)})",
                    flush=True,
                )
        elif _SELECTION_KEYS & set(changed):
            self._select_again(checkpoint, state)
        if state.best_global_step:
            self._locate(checkpoint, state)
        self.on_saved(state)

    def _select_again(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        """Select the best of the existing checkpoints by this run's metric."""
        _clear(state)
        if self._arguments.metric_for_best_model is None:
            return
        metric = f"eval_{self._arguments.metric_for_best_model.removeprefix('eval_')}"
        for line in state.log_history:
            value, step = line.get(metric), line["step"]
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            better = state.best_metric is None or self._is_better(value, state.best_metric)
            if better and self._find_folder(f"checkpoint-{step}", checkpoint):
                state.best_metric, state.best_global_step = value, step
        if is_first_rank():
            best = state.best_global_step and f"checkpoint-{state.best_global_step} ({state.best_metric:.4f})"
            print(f"best model so far by {metric}, of the existing checkpoints: {best or 'none'}", flush=True)

    def _locate(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        """Find the folder of the best checkpoint: it may have been moved or copied since."""
        name = f"checkpoint-{state.best_global_step}"
        folder = self._find_folder(name, checkpoint)
        state.best_model_checkpoint = str(folder) if folder else None
        if not folder and self._arguments.load_best_model_at_end and is_first_rank():
            print(
                f"warning: the best model so far, {name} (eval metric {state.best_metric:.4f}), is no longer in "
                "output_dir: unless a later one is better, the run ends with the last model.",
                flush=True,
            )

    def _find_folder(self, name: str, checkpoint: Checkpoint) -> Path | None:
        parents = (self._recipe.output_dir, checkpoint.folder.parent, self._recipe.save.mirror_dir)
        return next((path for parent in parents if parent and read_manifest(path := Path(parent, name))), None)

    def _is_lost(self, state: TrainerState) -> bool:
        """Return whether the best of all evaluated models is one whose checkpoint couldn't be written."""
        best = state.best_metric
        return self._lost is not None and (best is None or self._is_better(self._lost[0], best))

    def _is_better(self, metric: float, other: float) -> bool:
        return metric > other if self._arguments.greater_is_better else metric < other


def _clear(state: TrainerState) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
