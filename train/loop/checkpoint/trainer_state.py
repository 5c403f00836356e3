"""Run state: what transformers' checkpoints leave out, in run_state_RANK.json of each process.

Figures since the last logging step, a pending evaluation, a pending end of epoch: without them a resumed run would
have the same weights and another metrics.jsonl.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.loop.checkpoint.manifest import UNSHARDED
from train.loop.checkpoint.position import DataPosition
from train.ranks import is_launched_by_fsdp
from train.recipe import Recipe
from train.recipe.schedule import sequences_per_step

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "janus-sft")


class RunState(TrainerCallback):
    """Pending work of a run, and the learning rate of its last step."""

    def __init__(
        self,
        *,
        get_learning_rate: Callable[[], float],
        advance_schedule: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        """Begin without pending work.

        Args:
            get_learning_rate: returns that of the current step.
            advance_schedule: moves the learning rate's schedule by one step.
            resume: restores the state of a checkpoint, if the run resumes; called when training begins.
        """
        self._get_learning_rate, self._advance_schedule, self._resume = get_learning_rate, advance_schedule, resume
        self.evaluation_is_due = False
        """True if an evaluation was abandoned because the run had to stop."""
        self.schedule_was_held = False
        """True if DeepSpeed skipped the current step."""
        self.is_over = False
        """True if all steps of the run were done when it resumed."""
        self._learning_rate: float | None = None
        self._epoch_ends = False
        """True between the last step of an epoch and the work due at its end."""

    def write(self, folder: Path, rank: int, figures: Mapping[str, Any]) -> None:
        """Write this process's state into a checkpoint. `figures`: those of the trainer."""
        state = {
            **figures,
            "evaluation_is_due": self.evaluation_is_due,
            "epoch_ends": self._epoch_ends,
            "learning_rate": self._learning_rate,
        }
        (folder / f"run_state_{rank}.json").write_text(json.dumps(state), encoding="utf-8")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of the checkpoint that the run resumes from."""
        self._resume()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of the step, which is logged."""
        self._learning_rate = float(self._get_learning_rate())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note whether the epoch or the run ends here.

        DeepSpeed doesn't advance the schedule at a step that it skips; a skipped step counts like any other.
        """
        self._epoch_ends = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if self.schedule_was_held:
            self.schedule_was_held = False
            self._advance_schedule()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the pending end of the epoch. A run that was over when it resumed has done its work already."""
        self._epoch_ends = False
        if self.is_over:
            control.should_log = control.should_evaluate = control.should_save = False


def read_run_states(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the states of all processes in a checkpoint by rank, in order."""
    paths = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("run_state_*.json")}
    return {rank: json.loads(paths[rank].read_text(encoding="utf-8")) for rank in sorted(paths)}


def build_manifest(
    recipe: Recipe,
    run: Mapping[str, Any],
    arguments: TrainingArguments,
    state: TrainerState,
    position: DataPosition,
) -> dict[str, Any]:
    """Return the content of COMPLETE.json but for the files. `run`: fingerprint of recipe and data."""
    wandb = sys.modules.get("wandb")
    wandb_run = wandb.run if wandb else None
    return {
        "step": state.global_step,
        "epoch": state.epoch,
        "sequences": position.consumed(state.global_step),
        "sequences_per_epoch": position.sequences,
        "tokens": state.num_input_tokens_seen,
        "run": dict(run),
        "processes": arguments.world_size,
        "sequence_parallel": recipe.model.sequence_parallel,
        "sequences_per_step": sequences_per_step(recipe, arguments.world_size),
        "distribution": optimizer_distribution(arguments),
        "packages": _installed_versions(),
        "wandb_run": wandb_run.id if wandb_run else None,
    }


def optimizer_distribution(arguments: TrainingArguments) -> str:
    """Return how the optimizer's states are distributed over the processes, as manifests name it."""
    if arguments.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{arguments.deepspeed_plugin.zero_stage}"
    return "FSDP" if is_launched_by_fsdp(os.environ) else UNSHARDED


def expected_files(arguments: TrainingArguments, *, deepspeed: bool, fsdp: bool) -> Iterator[str]:
    """Yield patterns of the files that a complete checkpoint of this run has, for each process."""
    yield "trainer_state.json"
    if arguments.save_only_model:
        return
    ranks = arguments.world_size
    for rank in range(ranks):
        yield f"run_state_{rank}.json"
        yield f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"
        if deepspeed:
            yield f"global_step*/*zero_pp_rank_{rank}_mp_rank_*optim_states.pt"
    yield "scheduler.pt"
    if deepspeed:
        yield from ("latest", "global_step*/*model_states.pt")
    elif not fsdp:
        yield "optimizer.pt"


@cache
def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
