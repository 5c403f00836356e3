"""Resumed settings: optimizer, schedule and position follow this run's recipe, only states come from the checkpoint.

transformers and DeepSpeed load both at once: `optimizer.pt` holds the settings of each parameter group beside its
states, `scheduler.pt` the base learning rates. A changed learning rate would come into force at the next step at best
(transformers#9099), a changed weight decay never. Here what the recipe changed is put back once all is loaded:

    states of the optimizer          checkpoint; fresh for another optimizer
    settings of parameter groups     checkpoint; this recipe's where a key of theirs changed
    settings of the schedule         this recipe
    position in the schedule         steps done
    position in the data             sequences done

so that a run whose recipe is the same goes on to the bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer import SCHEDULER_NAME

from train.errors import UserError
from train.loop.checkpoint.manifest import Checkpoint
from train.loop.checkpoint.resume import changed_keys, get_value, run_fingerprint
from train.ranks import is_first_rank
from train.recipe import Recipe

if TYPE_CHECKING:
    from train.loop.trainer import JanusTrainer

_GROUP_SETTINGS = {
    "training.learning_rate": {"lr", "initial_lr"},
    "training.weight_decay": {"weight_decay"},
    "training.adam_beta1": {"betas"},
    "training.adam_beta2": {"betas"},
    "training.adam_epsilon": {"eps"},
}
"""Settings of a parameter group that follow from a key of the recipe."""
_SAME_STATES = {"adamw_torch", "adamw_torch_fused"}
"""Optimizers that can take each other's states."""
_BY_METRIC = {"reduce_lr_on_plateau", "greedy"}
"""Schedules that follow a metric; all others are functions of the step."""
_METRIC_STATE = {
    *("best", "num_bad_epochs", "num_good_epochs", "cooldown_counter", "warmup_counter", "reset_start", "last_epoch"),
    *("_last_lr", "_streaming_avg", "optimizer"),
}
"""Attributes of a schedule by metric that are its state; the others are settings."""
_METRICS = {"training.metric_for_best_model", "training.greater_is_better"}
"""Keys that decide which figure such a schedule follows: that of another one says nothing about it."""


class _Ignored:
    """A schedule that loads nothing: transformers loads one together with the optimizer."""

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
        """True where the optimizer can't take the checkpoint's states."""
        self._groups: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    def refuse(self, checkpoint: Checkpoint, *, deepspeed: bool) -> None:
        """Raise UserError for an optimizer that DeepSpeed can't begin in the middle of a run."""
        if self.fresh_states and deepspeed:
            raise UserError(
                f"--resume: {checkpoint.folder} holds the optimizer {self._name(self._before)}, and this run has "
                f"{self._name(self._now)}. DeepSpeed loads weights and optimizer together, so it can't start another "
                "one in the middle of a run. Change training.optim back, or start anew from the checkpoint's weights: "
                f"`model.name_or_path={checkpoint.folder}`, `--resume never` and another output_dir."
            )

    def note(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        """Remember the settings of a new optimizer and schedule, before a checkpoint is loaded into them."""
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in _groups(optimizer)]
        self._schedule = dict(vars(_inner(schedule)))

    def load(self, trainer: "JanusTrainer", checkpoint: Path) -> None:
        """Load optimizer and schedule with `trainer`'s own method, and put back what this recipe says."""
        schedule: Any = trainer.lr_scheduler
        inner = _inner(schedule)
        if inner is schedule:
            saved = torch.load(checkpoint / SCHEDULER_NAME, weights_only=True)
            trainer.lr_scheduler = _Ignored()
        else:  # DeepSpeed's engine has loaded it
            saved = dict(vars(inner))
        try:
            if not self.fresh_states:
                trainer.load_states(str(checkpoint))
            elif is_first_rank():
                print(
                    f"the optimizer starts with fresh states after step {self.step}: {self._name(self._now)} can't "
                    f"take those of {self._name(self._before)}",
                    flush=True,
                )
        finally:
            trainer.lr_scheduler = schedule
        groups = _groups(trainer.optimizer)
        for group, fresh in zip(groups, self._groups, strict=True):
            group.update({key: fresh[key] for key in self._group_settings if key in fresh})
        self._place(inner, groups, saved)
        if trainer.is_deepspeed_enabled and "training.max_grad_norm" in self.changed:
            engine: Any = trainer.model_wrapped
            if hasattr(engine.optimizer, "clip_grad"):  # ZeRO-1 and -2 load this setting, too
                engine.optimizer.clip_grad = trainer.args.max_grad_norm

    def _place(self, schedule: Any, groups: list[dict[str, Any]], saved: Mapping[str, Any]) -> None:
        """Give a schedule the settings that it was made with, and the position that it had."""
        before, now = (str(get_value(facts, "training.lr_scheduler_type")) for facts in (self._before, self._now))
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
            rates = [fresh["lr"] for fresh in self._groups]
            if before == now:
                if self.changed.isdisjoint(_METRICS):
                    schedule.load_state_dict(dict(saved))
                reduced = [*saved["_last_lr"]] + [saved["_last_lr"][-1]] * len(rates)
                if "training.learning_rate" in self.changed:  # what the metric made of the old one, it makes of this
                    old = float(get_value(self._before, "training.learning_rate"))
                    reduced = [rate * (last / old) for rate, last in zip(rates, reduced, strict=False)]
                rates = reduced[: len(rates)]
            state = {key: value for key, value in vars(schedule).items() if key in _METRIC_STATE}
            vars(schedule).update({**self._schedule, **state})
        else:
            return  # one that a DeepSpeed configuration names, which is no part of the recipe
        for group, fresh, rate in zip(groups, self._groups, rates, strict=True):
            group["lr"] = rate
            if "initial_lr" in fresh:
                group["initial_lr"] = fresh["initial_lr"]
        schedule._last_lr = rates

    def _compare_optimizers(self) -> bool:
        """Return whether one optimizer can't take the other's states. Notes settings that only change in value."""
        before, now = self._name(self._before), self._name(self._now)
        if before != now:
            if not {before, now} <= _SAME_STATES:
                return True
            self._group_settings |= {"fused", "foreach"}
        if "training.optim_target_modules" in self.changed:
            return True
        old, new = (_arguments(facts.get("training.optim_args")) for facts in (self._before, self._now))
        for name in old.keys() | new.keys():
            if old.get(name) == new.get(name):
                continue
            if not (_is_nonzero(old.get(name)) and _is_nonzero(new.get(name))):
                return True  # a switch (amsgrad), or a term that there was none of: other states
            self._group_settings.add("betas" if name.startswith("beta") else name)
        return False

    @staticmethod
    def _name(facts: Mapping[str, Any]) -> str:
        return str(facts.get("training.optim") or TrainingArguments.default_optim)


def shift_of_steps(checkpoint: Checkpoint, sequences: int, sequences_per_step: int, steps_per_epoch: int) -> int:
    """Return the steps done, less those that epochs as they are now take to get as far in the data.

    Not 0 after a change of the batch or of the rows. Steps are counted on from the checkpoint all the same: a run that
    counted anew would write its checkpoints over those that it had.
    """
    manifest = checkpoint.manifest
    done, epoch = int(manifest["sequences"]), float(manifest["epoch"] or 0)
    before = int(manifest.get("sequences_per_epoch") or (round(done / epoch) if epoch else sequences)) or 1
    epochs, rest = divmod(done, before)
    steps, again = divmod(rest * sequences // before, sequences_per_step)
    shift = checkpoint.step - epochs * steps_per_epoch - steps
    if shift and again and is_first_rank():
        print(
            f"{checkpoint.folder.name} lies inside a step of {sequences_per_step:,} sequences: the first {again:,} of "
            "them are trained a second time",
            flush=True,
        )
    return shift


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return list(optimizer.param_groups)


def _inner(schedule: Any) -> Any:
    """Return the schedule itself, without accelerate's wrapper for DeepSpeed."""
    return getattr(schedule, "scheduler", schedule)


def _arguments(text: str | None) -> dict[str, str]:
    """Return `training.optim_args` by name."""
    pairs = (part.partition("=") for part in (text or "").replace(" ", "").split(",") if part)
    return {name: value for name, _, value in pairs}


def _is_nonzero(value: str | None) -> bool:
    try:
        return value is not None and float(value) != 0
    except ValueError:
        return False
