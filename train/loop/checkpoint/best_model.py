"""Which of the models that it evaluated a run ends with: the best that can be had, and no other one in silence."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from train.loop.checkpoint.manifest import Checkpoint, read_manifest
from train.loop.checkpoint.resume import RESUMABLE_CHANGES, changed_keys, run_fingerprint
from train.ranks import is_first_rank
from train.recipe.conflicts import chosen_by_gain

if TYPE_CHECKING:
    from train.loop.trainer import JanusTrainer

_CHOSEN_BY = {
    "training.metric_for_best_model",
    "training.greater_is_better",
    "training.load_best_model_at_end",
}
_MEASURED_ON = ("data.", "made.", "chat.")
"""Sections of keys that a figure of one evaluation and another must share to be compared."""


class BestModel:
    """The best model of a trainer's run, as transformers' state names it, where checkpoints come and go."""

    def __init__(self, trainer: "JanusTrainer") -> None:
        self._trainer = trainer
        self._saved: tuple[float | None, int | None, str | None] = (None, None, None)
        """Metric, step and folder of the best as of the last checkpoint that was written."""
        self._lost: tuple[float, int] | None = None
        """Metric and step of the best whose checkpoint couldn't be written."""

    def was_saved(self) -> None:
        """A checkpoint was written, which holds what the state says is the best, or comes after it."""
        state = self._trainer.state
        self._saved = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def was_not_saved(self) -> None:
        """The checkpoint of this step couldn't be written: if it was the best, the one before it is again."""
        state = self._trainer.state
        if state.best_metric is None or state.best_global_step != state.global_step:
            return
        if self._lost is None or self._is_better(state.best_metric, self._lost[0]):
            self._lost = state.best_metric, state.global_step
        state.best_metric, state.best_global_step, state.best_model_checkpoint = self._saved

    def is_in_memory(self) -> bool:
        """Whether the best was lost, and is the last: then none is loaded, and the state says so from here on."""
        state = self._trainer.state
        if not self._is_lost() or self._lost is None or self._lost[1] != state.global_step:
            return False
        state.best_metric, state.best_global_step = self._lost
        return True

    def tell(self) -> None:
        """Say, at the end of a run that was to end with the best model, that it doesn't."""
        arguments, state = self._trainer.args, self._trainer.state
        if not (arguments.load_best_model_at_end and self._is_lost() and self._lost and is_first_rank()):
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
            f"warning: the model of step {step} was the best by {arguments.metric_for_best_model} ({metric:.4f}), but "
            f"its checkpoint couldn't be written: this run ends with {instead}.",
            flush=True,
        )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take up what the state of a checkpoint says, if this run chooses and measures as that one did."""
        trainer, state = self._trainer, self._trainer.state
        now = {**run_fingerprint(trainer._recipe), **trainer._about}
        changed = changed_keys(checkpoint.manifest["run"], now)
        by_gain = chosen_by_gain(trainer.args.metric_for_best_model)
        sections = (*_MEASURED_ON, "system_gain.") if by_gain else _MEASURED_ON
        measured_on = [key for key in changed if key.startswith(sections) and key not in RESUMABLE_CHANGES]
        if measured_on and state.best_global_step:
            self._forget()
            if trainer.args.load_best_model_at_end and is_first_rank():
                print(
                    f"the best model is sought from step {state.global_step} on: figures of the steps before can't be "
                    f"compared with those that follow ({', '.join(measured_on)})",
                    flush=True,
                )
        elif _CHOSEN_BY & set(changed):
            self._choose_again(checkpoint)
        if state.best_global_step:
            self._find(checkpoint)
        self.was_saved()

    def _choose_again(self, checkpoint: Checkpoint) -> None:
        """By another metric, of the checkpoints that are there."""
        trainer, state = self._trainer, self._trainer.state
        self._forget()
        if trainer.args.metric_for_best_model is None:
            return
        metric = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"
        for line in state.log_history:
            value, step = line.get(metric), line["step"]
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            better = state.best_metric is None or self._is_better(value, state.best_metric)
            if better and self._folder(f"checkpoint-{step}", checkpoint):
                state.best_metric, state.best_global_step = value, step
        if is_first_rank():
            chosen = state.best_global_step and f"checkpoint-{state.best_global_step} ({state.best_metric:.4f})"
            print(f"the best model so far by {metric}, of those that are there: {chosen or 'none'}", flush=True)

    def _forget(self) -> None:
        state = self._trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _find(self, checkpoint: Checkpoint) -> None:
        """Where the best checkpoint lies now: its folder may have been moved, or the one gone on from copied."""
        state = self._trainer.state
        name = f"checkpoint-{state.best_global_step}"
        found = self._folder(name, checkpoint)
        state.best_model_checkpoint = str(found) if found else None
        if not found and self._trainer.args.load_best_model_at_end and is_first_rank():
            print(
                f"warning: the best model so far, {name} (eval metric {state.best_metric:.4f}), is not in output_dir "
                "any more: unless a later one is better, the last model is what this run ends with.",
                flush=True,
            )

    def _folder(self, name: str, checkpoint: Checkpoint) -> Path | None:
        recipe = self._trainer._recipe
        parents = (recipe.output_dir, checkpoint.folder.parent, recipe.save.mirror_dir)
        return next((path for parent in parents if parent and read_manifest(path := Path(parent, name))), None)

    def _is_lost(self) -> bool:
        """Whether the best of all evaluated models is one whose checkpoint couldn't be written."""
        best = self._trainer.state.best_metric
        return self._lost is not None and (best is None or self._is_better(self._lost[0], best))

    def _is_better(self, one: float, other: float) -> bool:
        return one > other if self._trainer.args.greater_is_better else one < other
