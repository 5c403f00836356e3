"""Combinations of a recipe and a way to distribute it that a run refuses.

Training asks at its start, scripts/submit.py before a job is queued, and the memory plan before it offers a strategy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from train.loop.master_weights import Launch
from train.recipe import Recipe
from train.recipe.checkpointing import Checkpointing, checkpointing_of


def sharding_error(recipe: Recipe, launch: Launch, checkpointing: Checkpointing | None = None) -> str | None:
    """Return an error for settings under which a save has no model, or a key of the recipe has no effect.

    `checkpointing`: in place of the recipe's.
    """
    checkpointing = checkpointing or checkpointing_of(recipe.training)
    errors: Iterator[str] = iter(())
    if launch.deepspeed is not None:
        errors = _deepspeed_errors(recipe, launch.deepspeed, checkpointing)
    elif launch.fsdp:
        errors = _fsdp_errors(recipe, launch)
    return next(errors, None)


def _deepspeed_errors(recipe: Recipe, deepspeed: Mapping[str, Any], checkpointing: Checkpointing) -> Iterator[str]:
    for key in ("sequence_parallel_size", "tensor_parallel.autotp_size"):
        if (_value(deepspeed, key) or 1) > 1:
            yield (
                f"the DeepSpeed configuration has `{key}: {_value(deepspeed, key)}`, which does not support packed "
                "rows. Remove it. To divide long sequences between GPUs, write `model.sequence_parallel` in the recipe."
            )
    if _value(deepspeed, "zero_optimization.stage") == 3:
        yield from _zero3_errors(recipe, deepspeed, checkpointing)
    if used := _value(deepspeed, "optimizer.type"):
        optim = recipe.training.get("optim")
        if optim is not None and not optim.startswith("adamw_torch"):
            yield (
                f"training.optim: {optim} would not be used: the DeepSpeed configuration names its own optimizer, "
                f"{used}. Write adamw_torch, or launch with a configuration that leaves the optimizer to the recipe."
            )


def _zero3_errors(recipe: Recipe, deepspeed: Mapping[str, Any], checkpointing: Checkpointing) -> Iterator[str]:
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if not _value(deepspeed, key):
        yield (
            f"the DeepSpeed configuration lacks `{key}: true`, so a save would hold DeepSpeed's partitions and no "
            "model. Add it, or launch with accelerate_configs/zero3.yaml."
        )
    if recipe.adapter is not None and checkpointing == "selective":
        yield (
            "training.gradient_checkpointing_kwargs: `selective: true` needs non-reentrant checkpointing, and an "
            "adapter under ZeRO-3 needs the reentrant one. Remove selective, or launch with "
            "accelerate_configs/zero2.yaml."
        )
    if recipe.model.float8 is not None and checkpointing == "none":
        yield (
            "model.float8: under ZeRO-3 its layers would hold all weights, gathered from all ranks, from the forward "
            "to the backward pass. Write `training.gradient_checkpointing: true`, which holds those of one layer."
        )
    yield from _storage_errors(recipe)


def _fsdp_errors(recipe: Recipe, launch: Launch) -> Iterator[str]:
    if "FULL_STATE_DICT" not in launch.state_dict:
        yield (
            f"fsdp_state_dict_type: {launch.state_dict} saves FSDP's shards and no model. Write FULL_STATE_DICT, or "
            "launch with accelerate_configs/fsdp2.yaml."
        )
    yield from _storage_errors(recipe)


def _storage_errors(recipe: Recipe) -> Iterator[str]:
    """Yield an error unless 4-bit weights are stored in the model's type: ranks split by it (peft#1550, #2016)."""
    if recipe.quantization is None:
        return
    storage, dtype = recipe.quantization.bnb_4bit_quant_storage, recipe.model.dtype
    if dtype not in (storage, "auto"):
        yield (
            f"quantization.bnb_4bit_quant_storage: {storage} differs from model.dtype: {dtype}. ZeRO-3 and FSDP need "
            f"weights of one type. Write the same type for both, and for bnb_4bit_compute_dtype."
        )


def _value(deepspeed: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key of a DeepSpeed configuration; None if it is missing."""
    value: Any = deepspeed
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
