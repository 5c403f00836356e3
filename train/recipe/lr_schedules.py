"""Arguments of transformers' learning rate schedulers, checked without importing transformers.

`training.lr_scheduler_kwargs` is passed unchecked to a function of transformers/optimization.py when the model is
loaded, and wrong values show only steps later. The table here is tested against the signatures of those functions.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

KWARGS = "lr_scheduler_kwargs"
FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARMUP = ("constant", *FOLLOWS_EVALUATION)

_ABOVE_ZERO = Annotated[float, Field(gt=0)]
_NOT_NEGATIVE = Annotated[float, Field(ge=0)]
_SHARE = Annotated[float, Field(ge=0, le=1)]
_COUNT = Annotated[int, Field(ge=0)]
_CURVE = Literal["linear", "cosine", "1-sqrt"]
_MIN_LR = {"num_cycles": _ABOVE_ZERO, "min_lr": _NOT_NEGATIVE | None, "min_lr_rate": _SHARE | None}
_PLATEAU = {
    **{"mode": Literal["min", "max"], "factor": Annotated[float, Field(gt=0, lt=1)], "patience": _COUNT},
    **{"threshold": _NOT_NEGATIVE, "threshold_mode": Literal["rel", "abs"], "cooldown": _COUNT},
    **{"min_lr": _NOT_NEGATIVE | list[float], "eps": _NOT_NEGATIVE},
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": _ABOVE_ZERO},
    "cosine_with_restarts": {"num_cycles": _ABOVE_ZERO},
    "polynomial": {"lr_end": _NOT_NEGATIVE, "power": _ABOVE_ZERO},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": Annotated[int, Field(ge=1)] | None},
    "reduce_lr_on_plateau": _PLATEAU,
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": {**_MIN_LR, "warmup_lr_rate": _SHARE | None},
    "warmup_stable_decay": {
        **{"num_decay_steps": Annotated[int, Field(ge=1)], "num_stable_steps": _COUNT | None},
        **{"warmup_type": _CURVE, "decay_type": _CURVE, "min_lr_ratio": _SHARE, "num_cycles": _ABOVE_ZERO},
    },
    "greedy": {
        **_PLATEAU,
        **{"warmup": _COUNT, "max_lr": _ABOVE_ZERO | list[float], "verbose": bool, "smooth": bool},
        **{"window_size": Annotated[int, Field(ge=1)], "reset_start": _COUNT},
    },
}
"""Arguments of each scheduler except `last_epoch`, which a resume sets."""
_REQUIRED = {
    **dict.fromkeys(
        ("cosine_with_min_lr", "cosine_warmup_with_min_lr"),
        (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}, a share of the learning rate, or {min_lr: 1e-6}"),
    ),
    "warmup_stable_decay": (("num_decay_steps",), "{num_decay_steps: N}, the length of the decay at the end"),
}
"""Arguments of which a scheduler requires one, and what to write."""
_MINIMUM = {
    "polynomial": ("lr_end", 1e-7),
    "greedy": ("min_lr", 1e-3),
    **dict.fromkeys(("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr"), ("min_lr", 0.0)),
}
"""The argument that sets the lowest learning rate of a scheduler, with transformers' default."""


@cache
def arguments_model(scheduler: str) -> type[BaseModel]:
    """Return the strict model of `training.lr_scheduler_kwargs` for a `training.lr_scheduler_type`."""
    columns: dict[str, Any] = {name: (kind, Field(default=None)) for name, kind in ARGUMENTS[scheduler].items()}
    return create_model("SchedulerArguments", __config__=ConfigDict(extra="forbid", strict=True), **columns)


def scheduler_kwargs(training: Mapping[str, Any]) -> Any:
    """Return `training.lr_scheduler_kwargs`, parsed where it is JSON text of a mapping; `{}` where it is missing."""
    kwargs = training.get(KWARGS)
    if isinstance(kwargs, str) and kwargs.startswith("{"):
        try:
            return json.loads(kwargs)
        except ValueError:
            return kwargs
    return {} if kwargs is None else kwargs


def kwargs_conflicts(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the conflicts between arguments in `training.lr_scheduler_kwargs` that are valid each by itself.

    `settings`: `training` with TRL's defaults.
    """
    scheduler, rate, kwargs = settings["lr_scheduler_type"], settings["learning_rate"], scheduler_kwargs(settings)
    key = f"`training.lr_scheduler_type: {scheduler}`"
    if scheduler in _REQUIRED:
        names, example = _REQUIRED[scheduler]
        present = [name for name in names if kwargs.get(name) is not None]
        if not present:
            yield f"{key} needs {' or '.join(names)}. Write `training.{KWARGS}: {example.replace('}', '}`', 1)}."
        elif len(present) > 1:
            yield f"{' and '.join(present)} are both given. Keep one of them."
    name, default = _MINIMUM.get(scheduler, ("", None))
    minimum = kwargs.get(name, default)
    if isinstance(minimum, float | int) and (minimum > rate or (minimum == rate and scheduler == "polynomial")):
        source = "given" if name in kwargs else f"{scheduler}'s default"
        yield (
            f"{name} is {minimum:g} ({source}), which is not below `training.learning_rate` ({rate:g}). Write "
            f"`training.{KWARGS}: {{{name}: R}}` with a lower rate R."
        )


def decay_error(settings: Mapping[str, Any], steps: int, warmup_steps: int) -> str | None:
    """Return an error where warm-up and decay of warmup_stable_decay take more steps than the run has."""
    kwargs = scheduler_kwargs(settings)
    decay = kwargs.get("num_decay_steps")
    if settings["lr_scheduler_type"] != "warmup_stable_decay" or kwargs.get("num_stable_steps") is not None:
        return None
    if decay is None or warmup_steps + decay <= steps:
        return None
    return (
        f"training.{KWARGS}.num_decay_steps: {decay:,} steps of decay and {warmup_steps:,} of warm-up are more than "
        f"the {steps:,} steps of the run. Write {max(steps - warmup_steps, 0):,} or less."
    )
