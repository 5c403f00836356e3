"""Resumed settings: optimizer, schedule and position follow this run's recipe, only states come from the checkpoint.

transformers and DeepSpeed load both at once: `optimizer.pt` holds the settings of each parameter group beside its
states, `scheduler.pt` the base learning rates. A changed learning rate would take effect at the next step at best
(transformers#9099), a changed weight decay never. Here, what the recipe changes is restored after loading:

    states of the optimizer          checkpoint; fresh for another optimizer
    settings of parameter groups     checkpoint; this recipe's if a key of theirs changed
    settings of the schedule         this recipe
    position in the schedule         steps done
    position in the data             sequences done (`position.py`)

A run whose recipe is unchanged resumes bit-identically.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer import SCHEDULER_NAME

from train.errors import UserError
from train.loop.checkpoint.fingerprint import changed_keys, get_value, run_fingerprint
from train.loop.checkpoint.manifest import Checkpoint
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.recipe.optimizer_arguments import uses_bitsandbytes

_GROUP_SETTINGS = {
    "training.learning_rate": {"lr", "initial_lr"},
    "training.weight_decay": {"weight_decay"},
    "training.adam_beta1": {"betas"},
    "training.adam_beta2": {"betas"},
    "training.adam_epsilon": {"eps"},
}
"""Settings of a parameter group by the key of the recipe that decides them."""
_SAME_STATES = {"adamw_torch", "adamw_torch_fused"}
"""Optimizers that can load each other's states."""
_BY_METRIC = {"reduce_lr_on_plateau", "greedy"}
"""Schedules that follow a metric; all others are functions of the step."""
_METRIC_STATE = {
    *("best", "num_bad_epochs", "num_good_epochs", "cooldown_counter", "warmup_counter", "reset_start", "last_epoch"),
    *("_last_lr", "_streaming_avg", "optimizer"),
}
"""Attributes of a schedule that follows a metric: its state. All others are settings."""
_METRICS = {"training.metric_for_best_model", "training.greater_is_better"}
"""Keys that decide which metric such a schedule follows: its state is that of one metric."""


class FixedSchedule:
    """A schedule whose loading does nothing: transformers loads it together with the optimizer."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class ResumedSettings:
    """Settings of this run that differ from those of the checkpoint that it resumes from."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """Compare the recipe with that of the checkpoint."""
        self._before, self._now = checkpoint.manifest["run"], run_fingerprint(recipe)
        self.changed = set(changed_keys(self._before, self._now))
        self.step = checkpoint.step
        self._group_settings: set[str] = set()
        for key in self.changed & _GROUP_SETTINGS.keys():
            self._group_settings |= _GROUP_SETTINGS[key]
        self.fresh_states = self._compare_optimizers()
        """True if the optimizer can't load the checkpoint's states."""
        self._groups: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    def refuse_under_deepspeed(self, checkpoint: Checkpoint, processes: int | None = None) -> None:
        """Raise UserError for an optimizer that DeepSpeed, if it wrote the checkpoint, can't continue in this run.

        `processes`: those of this run, if they are known: DeepSpeed's converter can't join the partitions of
        bitsandbytes' states for other processes, as they are quantized in blocks.
        """
        optimizer, before = self._name(self._before), checkpoint.manifest["processes"]
        partitioned = checkpoint.manifest["distribution"].startswith("DeepSpeed") and before != (processes or before)
        if partitioned and uses_bitsandbytes(optimizer):
            raise UserError(
                f"--resume: {checkpoint.folder} was written by {before} processes, and the states of its optimizer, "
                f"{optimizer}, can't be converted for {processes}: only Adam's in full precision can. Resume with "
                f"{before} processes, or begin a new run with the checkpoint's weights: "
                f"`model.name_or_path={checkpoint.folder}`, `--resume never` and another output_dir."
            )
        if self.fresh_states and checkpoint.manifest["distribution"].startswith("DeepSpeed"):
            raise UserError(
                f"--resume: {checkpoint.folder} holds the optimizer {self._name(self._before)}, and this run has "
                f"{self._name(self._now)}. DeepSpeed loads weights and optimizer together, so it can't start another "
                "one in the middle of a run. Change training.optim back, or begin a new run with the checkpoint's "
                f"weights: `model.name_or_path={checkpoint.folder}`, `--resume never` and another output_dir."
            )

    def note_new(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        """Note the settings of a new optimizer and schedule, before a checkpoint is loaded into them."""
        self._groups = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        self._schedule = dict(vars(_unwrap(schedule)))

    def read_schedule(self, schedule: Any, checkpoint: Path) -> Mapping[str, Any]:
        """Return the state of the checkpoint's schedule. DeepSpeed's engine has loaded it into `schedule` already."""
        if is_wrapped(schedule):
            return dict(vars(_unwrap(schedule)))
        state: Mapping[str, Any] = torch.load(checkpoint / SCHEDULER_NAME, weights_only=True)
        return state

    def apply(self, optimizer: Any, schedule: Any, saved: Mapping[str, Any]) -> None:
        """Apply this recipe's settings after the states have been loaded. `saved`: from `read_schedule`."""
        groups = list(optimizer.param_groups)
        for group, new in zip(groups, self._groups, strict=True):
            group.update({key: new[key] for key in self._group_settings if key in new})
        self._set_position(_unwrap(schedule), groups, saved)

    def print_fresh_states(self) -> None:
        """Print why the optimizer starts with fresh states."""
        if is_first_rank():
            print(
                f"the optimizer starts with fresh states after step {self.step}: {self._name(self._now)} can't load "
                f"those of {self._name(self._before)}",
                flush=True,
            )

    def _set_position(self, schedule: Any, groups: list[dict[str, Any]], saved: Mapping[str, Any]) -> None:
        """Give a schedule this recipe's settings and the checkpoint's position."""
        before, now = (str(get_value(run, "training.lr_scheduler_type")) for run in (self._before, self._now))
        by_metric = before in _BY_METRIC
        if isinstance(schedule, LambdaLR):
            vars(schedule).update(self._schedule)
            schedule.last_epoch = self.step if by_metric or self.fresh_states else saved["last_epoch"]
            schedule._step_count = schedule.last_epoch + 1
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
        elif isinstance(schedule, ReduceLROnPlateau | GreedyLR):
            rates = [new["lr"] for new in self._groups]
            if before == now:
                if self.changed.isdisjoint(_METRICS):
                    schedule.load_state_dict(dict(saved))
                reduced = [*saved["_last_lr"]] + [saved["_last_lr"][-1]] * len(rates)
                if "training.learning_rate" in self.changed:  # reduced by the same factors
                    old = float(get_value(self._before, "training.learning_rate"))
                    reduced = [rate * (last / old) for rate, last in zip(rates, reduced, strict=False)]
                rates = reduced[: len(rates)]
            state = {key: value for key, value in vars(schedule).items() if key in _METRIC_STATE}
            vars(schedule).update({**self._schedule, **state})
        else:
            return  # from a DeepSpeed configuration, which is not part of the recipe
        for group, new, rate in zip(groups, self._groups, rates, strict=True):
            group["lr"] = rate
            if "initial_lr" in new:
                group["initial_lr"] = new["initial_lr"]
        schedule._last_lr = rates

    def _compare_optimizers(self) -> bool:
        """Return whether one optimizer can't load the other's states. Note settings that only change in value."""
        before, now = self._name(self._before), self._name(self._now)
        if before != now:
            if not {before, now} <= _SAME_STATES:
                return True
            self._group_settings |= {"fused", "foreach"}
        if "training.optim_target_modules" in self.changed:
            return True
        old, new = (_parse_arguments(run.get("training.optim_args")) for run in (self._before, self._now))
        for name in old.keys() | new.keys():
            if old.get(name) == new.get(name):
                continue
            if not (_is_nonzero(old.get(name)) and _is_nonzero(new.get(name))):
                return True  # a switch (amsgrad) or a new term: other states
            self._group_settings.add("betas" if name.startswith("beta") else name)
        return False

    @staticmethod
    def _name(run: Mapping[str, Any]) -> str:
        return str(run.get("training.optim") or TrainingArguments.default_optim)


def is_wrapped(schedule: Any) -> bool:
    """Return whether a schedule is in accelerate's wrapper for DeepSpeed."""
    return _unwrap(schedule) is not schedule


def _unwrap(schedule: Any) -> Any:
    return getattr(schedule, "scheduler", schedule)


def _parse_arguments(text: str | None) -> dict[str, str]:
    """Return `training.optim_args` by name."""
    pairs = (part.partition("=") for part in (text or "").replace(" ", "").split(",") if part)
    return {name: value for name, _, value in pairs}


def _is_nonzero(value: str | None) -> bool:
    try:
        return value is not None and float(value) != 0
    except ValueError:
        return False
