"""Settings that the plan compares for one recipe, and the overrides that turn the recipe into each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from train.model.architecture import Architecture
from train.preflight.plan.memory import Strategy
from train.preflight.plan.optimizer_states import runs_on_host
from train.recipe import Recipe
from train.recipe.checkpointing import (
    CHECKPOINTING_KEYS,
    KWARGS_KEYS,
    Checkpointing,
    checkpointing_kwargs,
    checkpointing_of,
)
from train.recipe.schedule import BATCH_KEYS
from train.recipe.sft_config import with_defaults

_DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' with torch 2.8 or newer
_WITHOUT_OPERATOR = ("eager", "flex_attention")
"""Kernels that TRL's selective checkpointing does not recognise (selective_activation_checkpointing.py in trl/models),
so it would save nothing."""


@dataclass(frozen=True)
class Settings:
    """One way to run a recipe. Rows, loss and sequences per step are the same under all of them.

    - `dtype`: of the loaded weights, `model.dtype`;
    - `checkpointing`: none, selective (attention outputs are kept) or full (layer inputs are kept);
    - `batch`, `accumulation`: sequences of a micro-batch, micro-batches of an optimizer step;
    - `optimizer`: `training.optim`;
    - `offloaded`: activations are moved to the host (`training.activation_offloading`), which the plan doesn't count.
    """

    strategy: Strategy
    dtype: str
    checkpointing: Checkpointing
    batch: int
    accumulation: int
    optimizer: str
    offloaded: bool = False


def optimizer_name(recipe: Recipe) -> str:
    """Return the recipe's `training.optim`, or transformers' default."""
    return str(recipe.training.get("optim") or _DEFAULT_OPTIMIZER)


def computes_in_16_bits(recipe: Recipe) -> bool:
    """Return whether matrix products have 16-bit operands: DeepSpeed's bf16 or fp16, or autocast."""
    settings = with_defaults(recipe.training)
    return bool(settings["fp16"]) or settings.get("bf16") is not False


def uses_tf32(recipe: Recipe) -> bool:
    """Return whether products of float32 numbers may use TF32: torch_compile sets it by default (TrainingArguments)."""
    settings = with_defaults(recipe.training)
    return bool(settings["torch_compile"]) if settings["tf32"] is None else bool(settings["tf32"])


def has_16_bit_weights(shape: Architecture) -> bool:
    """Return whether the weights of `shape` are loaded in 16 bits."""
    return next(parameter.itemsize for parameter in shape.parameters if parameter.role != "adapter") == 2


def written_settings(recipe: Recipe, strategy: Strategy, optimizer: str | None = None) -> Settings:
    """Return the settings of the recipe as written; offload replaces an optimizer that can't run on the host."""
    settings = with_defaults(recipe.training)
    optimizer = optimizer or optimizer_name(recipe)
    return Settings(
        strategy=strategy,
        dtype=recipe.model.dtype,
        checkpointing=checkpointing_of(settings),
        batch=settings["per_device_train_batch_size"],
        accumulation=settings["gradient_accumulation_steps"],
        optimizer="adamw_torch" if strategy.offload and not runs_on_host(optimizer) else optimizer,
        offloaded=bool(settings["activation_offloading"]),
    )


def list_settings(
    recipe: Recipe, strategy: Strategy, attention: str, optimizer: str | None = None, *, loses_updates: bool
) -> Iterator[Settings]:
    """Yield all settings under `strategy` with the recipe's sequences per step.

    `attention`: the kernel; `optimizer`: in place of the recipe's.

    - dtype: the recipe's; float32 (computed in 16 bits by autocast) under DDP and on one GPU if the recipe's
      `loses_updates` there (train/loop/master_weights.py).
    - checkpointing: all that saves memory with this attention; some of them may be refused under `strategy`
      (train/loop/sharding.py).
    - micro-batch: the divisors of the recipe's sequences per process.
    """
    written = written_settings(recipe, strategy, optimizer)
    dtype = "float32" if strategy.stage == 0 and loses_updates else written.dtype
    sequences = written.batch * written.accumulation
    for checkpointing in _checkpointing_choices(recipe, attention):
        for batch in (size for size in range(1, sequences + 1) if sequences % size == 0):
            yield Settings(strategy, dtype, checkpointing, batch, sequences // batch, written.optimizer)


def list_overrides(recipe: Recipe, settings: Settings) -> list[str]:
    """Return the overrides `key=value` that give the recipe these settings; none where it has them."""
    defaults = with_defaults(recipe.training)
    changes: list[tuple[str, Any]] = []
    if settings.dtype != recipe.model.dtype:
        changes.append(("model.dtype", settings.dtype))
    now, written = settings.checkpointing, checkpointing_of(defaults)
    if now != written and "none" in (now, written):
        changes += [(f"training.{key}", now != "none") for key in _written_keys(recipe, CHECKPOINTING_KEYS)]
    if now != written and "selective" in (now, written):
        keys = [key for key in _written_keys(recipe, KWARGS_KEYS) if not isinstance(recipe.training.get(key), str)]
        changes += [(f"training.{key}.selective", now == "selective") for key in keys]
        reentrant = [
            key for key in keys if now == "selective" and checkpointing_kwargs(defaults, key).get("use_reentrant")
        ]
        changes += [(f"training.{key}.use_reentrant", False) for key in reentrant]  # selective needs the other kind
    for key, value in zip(BATCH_KEYS, (settings.batch, settings.accumulation), strict=True):
        if value != defaults[key.removeprefix("training.")]:
            changes.append((key, value))
    if settings.optimizer != optimizer_name(recipe):
        changes.append(("training.optim", settings.optimizer))
    if settings.offloaded != bool(defaults["activation_offloading"]):
        changes.append(("training.activation_offloading", settings.offloaded))
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes]


def _written_keys(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Return the names of one setting that the recipe uses, or the first."""
    return [name for name in names if recipe.training.get(name) is not None] or [names[0]]


def _checkpointing_choices(recipe: Recipe, attention: str) -> list[Checkpointing]:
    """Return the checkpointing to choose from: where the section is JSON in a string, overrides can't change it."""
    if attention in _WITHOUT_OPERATOR:
        return ["none", "full"]
    if any(isinstance(recipe.training.get(key), str) for key in KWARGS_KEYS):
        selective = any(checkpointing_kwargs(recipe.training, key).get("selective") for key in KWARGS_KEYS)
        return ["none", "selective" if selective else "full"]
    return ["none", "selective", "full"]
