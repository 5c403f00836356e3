"""Arguments and packages of transformers' optimizers (`training.optim` and `training.optim_args`).

transformers silently ignores arguments that it doesn't know, misspelt ones included. The table here is tested against
its source (transformers/trainer_optimizer.py).
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from train.recipe.yaml_document import closest_match, did_you_mean

_NUMBER = (r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", "a number")
_COUNT = (r"\d+", "an integer >= 0")
_SWITCH = (r"(?i:true|false|1|0|yes|no)", "true or false")
_ON = (r"(?i:true|1|yes)", "true, or removed")  # transformers computes bool(text): `false` would be true
_DTYPE = (r"float32|bfloat16|float16", "float32, bfloat16 or float16")
_PROJECTION = (r"std|reverse_std|right|left|full", "std, reverse_std, right, left or full")

_GALORE = {"rank": _COUNT, "update_proj_gap": _COUNT, "scale": _NUMBER, "proj_type": _PROJECTION}
_APOLLO = {**_GALORE, "proj": (r"random|svd", "random or svd"), "scale_type": (r"channel|tensor", "channel or tensor")}
_ADEMAMIX = {
    **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), _NUMBER),
    "t_alpha": _COUNT,
    "t_beta3": _COUNT,
}
_ANYPRECISION = dict.fromkeys(("momentum_dtype", "variance_dtype", "compensation_buffer_dtype"), _DTYPE)
_GROK = ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")

Arguments = Mapping[str, tuple[str, str]]
"""Arguments by name: a pattern of the value and its description."""

_ARGUMENTS: list[tuple[str, Arguments]] = [
    (r"sgd", {**dict.fromkeys(("momentum", "dampening", "weight_decay"), _NUMBER), "nesterov": _SWITCH}),
    (r"adagrad", dict.fromkeys(("lr_decay", "weight_decay", "eps"), _NUMBER)),
    (r"rmsprop", {**dict.fromkeys(("momentum", "alpha", "eps", "weight_decay"), _NUMBER), "centered": _SWITCH}),
    (r"(paged_)?ademamix.*", _ADEMAMIX),
    (r"adamw_anyprecision", {**_ANYPRECISION, "use_kahan_summation": _SWITCH}),
    (r"galore_.*", _GALORE),
    (r"apollo_.*", _APOLLO),
    (r"grokadamw", dict.fromkeys(_GROK, _NUMBER)),
    (r"adamw_torch_[48]bit", {"bf16_stochastic_round": _SWITCH}),
    (r"schedule_free_.*", dict.fromkeys(("weight_lr_power", "r"), _NUMBER)),
    (r"stable_adamw", {"max_lr": _NUMBER, "kahan_sum": _ON, "decouple_lr": _ON}),
]
"""Arguments by a pattern of the optimizer's name; others take none. Arguments that transformers passes on as text to
code that computes with them are left out: all of bitsandbytes' RMSprop, `block_size` of torchao's AdamW."""

_PACKAGES = [
    (r"(paged_)?(ademamix|lion).*|paged_adamw.*|adamw_bnb_8bit|adamw_8bit|rmsprop_.*", "bitsandbytes", "bitsandbytes"),
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"galore_.*", "galore_torch", "galore-torch"),
    (r"apollo_.*", "apollo_torch", "apollo-torch"),
    (r"lomo|adalomo", "lomo_optim", "lomo-optim"),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"schedule_free_.*", "schedulefree", "schedulefree"),
    (r"stable_adamw", "optimi", "torch-optimi"),
    (r"adamw_anyprecision", "torchdistx", "torchdistx"),
    (r"adamw_torch_xla", "torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused", "torch_npu", "torch_npu"),
]
"""Module and package of an optimizer, by a pattern of its name."""
_PROJECTING = ("galore_", "apollo_")


def allowed_arguments(optimizer: str) -> Arguments:
    """Return the arguments that this optimizer takes in `training.optim_args`."""
    return next((arguments for name, arguments in _ARGUMENTS if re.fullmatch(name, optimizer)), {})


def uses_bitsandbytes(optimizer: str) -> bool:
    """Return whether an optimizer is one of bitsandbytes, whose states are quantized in blocks."""
    return re.fullmatch(_PACKAGES[0][0], optimizer) is not None


def optimizer_conflicts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each invalid key about the optimizer, with its error.

    `settings`: `training` with TRL's defaults.
    """
    optimizer, arguments = settings.get("optim"), settings.get("optim_args")
    if not isinstance(optimizer, str):
        optimizer = "the default optimizer"
    if isinstance(arguments, str) and arguments:
        for pair in arguments.replace(" ", "").split(","):
            if error := _argument_error(optimizer, pair):
                yield "optim_args", error
    targets, projects = settings.get("optim_target_modules"), optimizer.startswith(_PROJECTING)
    if projects and not targets:
        yield "optim_target_modules", f"required by {optimizer}. Write all-linear, or a list of module names."
    if targets and not projects:
        yield "optim_target_modules", f"not used by {optimizer}, only by galore_* and apollo_*. Remove it."
    if projects and optimizer.endswith("layerwise") and settings["gradient_accumulation_steps"] != 1:
        yield "gradient_accumulation_steps", f"{optimizer} updates weights at each backward pass. Write 1."


def _argument_error(optimizer: str, pair: str) -> str | None:
    allowed = allowed_arguments(optimizer)
    name, equals, value = pair.partition("=")
    if not equals or "=" in value:
        return f"found '{pair}'. Write arguments as `name=value, name=value`."
    if not allowed:
        return f"{optimizer} takes no arguments here, so {name} would be ignored. Remove it."
    if name not in allowed:
        suggestion = did_you_mean(closest_match(name, list(allowed), 0.6))
        return f"{optimizer} has no argument {name}. Allowed: {', '.join(allowed)}.{suggestion}"
    pattern, description = allowed[name]
    return None if re.fullmatch(pattern, value) else f"found '{pair}'. {name} must be {description}."


def missing_package(optimizer: str, installed: Callable[[str], Any] = importlib.util.find_spec) -> str | None:
    """Return the package of `training.optim` that is not installed; None where nothing is missing."""
    for name, module, package in _PACKAGES:
        if re.fullmatch(name, optimizer) and installed(module) is None:
            return package
    return None
