"""TRL's arguments of a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTConfig

from train.errors import UserError
from train.loop.tracking import integrations
from train.ranks import deepspeed_launch_error
from train.recipe import Recipe


@contextmanager
def as_user_error(key: str) -> Iterator[None]:
    """What TRL, peft and transformers say of settings as they are set up, told of `key`. Never for training itself."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ImportError) as fault:
        raise UserError(f"{key}: {' '.join(str(fault).split())}") from fault


def training_arguments(recipe: Recipe, stop_tokens: Sequence[str] = ()) -> SFTConfig:
    """TRL's own arguments, with what the recipe's other sections own filled in. Starts the process group, if any.

    `stop_tokens`: what ends an answer; the tokenizer is saved with the first of them as its eos token.
    Raises UserError where TRL or transformers refuses a combination of them.
    """
    settings: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        # looking for unused parameters costs a walk through the graph a step, and a dense model has none
        "ddp_find_unused_parameters": False,
        "logging_nan_inf_filter": False,  # a loss that is not finite shall show, no mean in its place (trl#6702)
        **recipe.training,
        "output_dir": recipe.output_dir,
        "save_total_limit": None,  # an older checkpoint goes when a newer one is known to be whole: see `Saver`
        "seed": recipe.seed,
        "max_length": None,
        "packing": False,
        "padding_free": recipe.data.packing,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eos_token": next(iter(stop_tokens), None),
        "report_to": integrations(recipe.tracking),
        "disable_tqdm": True,
    }
    if settings.get("activation_offloading") and settings["use_cpu"]:
        raise UserError(
            "training.activation_offloading: it moves activations to the CPU, where they are already. Write false."
        )
    if fault := deepspeed_launch_error(settings.get("deepspeed"), os.environ):
        raise UserError(fault)
    with as_user_error("training"):
        arguments = SFTConfig(**settings)
    check_sharding(recipe, arguments)
    return arguments


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raise UserError for settings under which a save would hold no model, or a key of the recipe would do nothing."""
    plugin = arguments.deepspeed_plugin
    deepspeed = plugin and plugin.hf_ds_config
    if deepspeed is not None and deepspeed.is_zero3():
        key = "stage3_gather_16bit_weights_on_model_save"
        if not deepspeed.get_value(f"zero_optimization.{key}"):
            raise UserError(
                f"the DeepSpeed configuration leaves out `zero_optimization.{key}: true`, so a save would hold no "
                "model, only DeepSpeed's own pieces. Add it, or launch with accelerate_configs/zero3.yaml."
            )
        selective = (arguments.gradient_checkpointing_kwargs or {}).get("selective")
        if recipe.adapter is not None and arguments.gradient_checkpointing and selective:
            raise UserError(
                "training.gradient_checkpointing_kwargs: `selective: true` needs checkpoints that aren't reentrant, "
                "and an adapter under ZeRO-3 needs those that are. Leave selective out, or launch with "
                "accelerate_configs/zero2.yaml."
            )
    if deepspeed is not None and deepspeed.get_value("optimizer.type"):
        wanted, used = recipe.training.get("optim"), deepspeed.get_value("optimizer.type")
        if wanted is not None and not wanted.startswith("adamw_torch"):
            raise UserError(
                f"training.optim: {wanted} would not be used: the DeepSpeed configuration names its own optimizer, "
                f"{used}. Write adamw_torch, or launch with a configuration that leaves the optimizer to the recipe."
            )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and "FULL_STATE_DICT" not in os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"):
        raise UserError(
            f"fsdp_state_dict_type: {os.environ['FSDP_STATE_DICT_TYPE']} saves no model, only FSDP's own pieces. Write "
            "FULL_STATE_DICT, or launch with accelerate_configs/fsdp2.yaml."
        )
    if recipe.quantization and (fsdp or (deepspeed is not None and deepspeed.is_zero3())):
        _check_storage(recipe)


def _check_storage(recipe: Recipe) -> None:
    """4-bit weights are split over ranks by the type that they are stored as (peft#1550, #2016)."""
    assert recipe.quantization is not None
    storage, dtype = recipe.quantization.bnb_4bit_quant_storage, recipe.model.dtype
    if dtype not in (storage, "auto"):
        raise UserError(
            f"quantization.bnb_4bit_quant_storage: {storage} differs from model.dtype: {dtype}. ZeRO-3 and FSDP split "
            f"weights of one type alone. Write the same type for both, and for bnb_4bit_compute_dtype."
        )
