"""Optimizer test: build a recipe's optimizer and learning rate schedule on a tiny model, before data is prepared."""

import math
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from train.errors import UserError
from train.recipe import Recipe
from train.recipe.lr_schedules import FOLLOWS_EVALUATION, scheduler_kwargs
from train.recipe.schedule import absolute_steps
from train.recipe.sft_config import with_defaults

_DEFAULT = "adamw_torch_fused"  # transformers' own with torch 2.8 or newer
_STEPS = 1_000
"""Steps of the test if the run's depend on the data; also the maximum of learning rates that are computed."""
_ON_THE_MODEL = ("galore_", "apollo_", "lomo", "adalomo")
"""Optimizers that need modules of the real model: they are built when it is loaded."""
_KEYS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
"""Keys of an optimizer's arguments, for messages."""
_REFUSALS = (ValueError, TypeError, LookupError, ImportError, AttributeError, ArithmeticError, RuntimeError)


def check_optimizer(recipe: Recipe) -> None:
    """Build both as the Trainer will, and compute learning rates from the first step to the last.

    `train.recipe.lr_schedules` and `train.recipe.optimizer_arguments` check the arguments that they know, with advice.
    This finds all other errors. Raises UserError.
    """
    settings = with_defaults(recipe.training)
    optimizer = _build_optimizer(settings)
    kind, arguments = settings["lr_scheduler_type"], scheduler_kwargs(settings)
    steps = settings["max_steps"] if settings["max_steps"] > 0 else _STEPS
    warmup_steps = absolute_steps(settings["warmup_steps"], steps)
    try:
        schedule = get_scheduler(kind, optimizer, warmup_steps, steps, scheduler_specific_kwargs=arguments)
        tested = [] if kind in FOLLOWS_EVALUATION else [*range(0, steps, -(-steps // _STEPS)), steps]
        rates = [schedule.lr_lambdas[0](step) * settings["learning_rate"] for step in tested]
    except _REFUSALS as error:
        raise UserError(
            f"training.lr_scheduler_kwargs: transformers can't build a {kind} schedule with "
            f"{arguments or 'no arguments'}: {' '.join(str(error).split())}. Write other arguments."
        ) from error
    for step, rate in zip(tested, rates, strict=True):
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(
                f"training.lr_scheduler_kwargs: the learning rate of step {step:,} would be {rate:g} with {arguments}. "
                "Write other arguments."
            )


def _build_optimizer(settings: dict[str, Any]) -> Optimizer:
    name, model = settings["optim"] or _DEFAULT, nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "weight_decay": settings["weight_decay"]},
        {"params": [model.bias], "weight_decay": 0.0},
    ]
    if name.startswith(_ON_THE_MODEL):
        return SGD(groups, lr=settings["learning_rate"])
    try:
        arguments: Any = SimpleNamespace(**{**settings, "optim": OptimizerNames(name)})
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind(groups, **keywords)
    except _REFUSALS as error:
        given = ", ".join(f"{key}: {settings[key]}" for key in _KEYS if settings[key] is not None)
        raise UserError(
            f"training.optim: {name} can't be built with {given}: {' '.join(str(error).split())}. Write other values."
        ) from error
