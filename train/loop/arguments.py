"""TRL's arguments of a run, and settings of DeepSpeed and FSDP that a run refuses."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import SFTConfig

from train.errors import UserError
from train.loop.fsdp import check_tied_modules, configure_fsdp2, is_fsdp2
from train.loop.tracking import tracker_names
from train.model.load import load_config
from train.model.text_part import build_meta_model
from train.ranks import deepspeed_launch_error, hpz_error, parallelism_error, world_size
from train.recipe import Recipe
from train.storage.transfer_time import longest_transfer


@contextmanager
def as_user_error(key: str) -> Iterator[None]:
    """Raise errors of TRL, peft and transformers during set-up as UserError about `key`. Not for training itself."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ImportError) as error:
        raise UserError(f"{key}: {' '.join(str(error).split())}") from error


def training_arguments(recipe: Recipe, stop_tokens: Sequence[str] = ()) -> SFTConfig:
    """Return TRL's arguments with the keys that other sections of the recipe decide. Starts the process group, if any.

    `stop_tokens`: the tokens that end an answer; the tokenizer is saved with the first of them as its eos token.
    Raises UserError if TRL or transformers refuses a combination of arguments.
    """
    settings: dict[str, Any] = {
        "use_cpu": not torch.accelerator.is_available(),
        # the search for unused parameters traverses the graph at each step, and a dense model has none
        "ddp_find_unused_parameters": False,
        "ddp_timeout": save_timeout(recipe),
        "logging_nan_inf_filter": False,  # log losses that are not finite, not a mean in their place (trl#6702)
        **recipe.training,
        "output_dir": recipe.output_dir,
        "save_total_limit": None,  # CheckpointWriter deletes older checkpoints once a newer one is complete
        "seed": recipe.seed,
        "max_length": None,
        "packing": False,
        "padding_free": recipe.data.packing,  # JanusTrainer: rows that aren't packed too, where the model allows it
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eos_token": next(iter(stop_tokens), None),
        "report_to": tracker_names(recipe.tracking),
        "disable_tqdm": True,
    }
    if settings.get("activation_offloading") and settings["use_cpu"]:
        raise UserError(
            "training.activation_offloading: this moves activations to the CPU, where they are already. Write false."
        )
    if error := deepspeed_launch_error(settings.get("deepspeed"), os.environ) or parallelism_error(os.environ):
        raise UserError(error)
    if settings["use_cpu"] and world_size() > 1:  # transformers passes ddp_timeout on for GPUs only
        timeout = timedelta(seconds=settings["ddp_timeout"])
        PartialState(cpu=True, backend=settings.get("ddp_backend"), timeout=timeout)
    with as_user_error("training"):
        arguments = SFTConfig(**settings)
    check_sharding(recipe, arguments)
    if is_fsdp2(arguments):
        check_tied_modules(recipe)
        configure_fsdp2(arguments)
    return arguments


def save_timeout(recipe: Recipe) -> int:
    """Return the seconds that ranks wait for each other: as long as the files of a checkpoint may take to be written.

    While the first rank writes the model, or deletes an older checkpoint, all others wait in the default process group
    (`CheckpointWriter`), whose timeout this is. The groups of DeepSpeed and of FSDP's meshes have NCCL's 10 minutes.
    A rank that hangs is noticed after the same time.

    The bytes are those of the weights and, per parameter, of a float32 master weight and two moments: 988 GB for a 70B
    in bfloat16. An adapter's are few. DEEPSPEED_TIMEOUT has no effect, as accelerate starts the group before DeepSpeed.
    """
    if world_size() == 1 or recipe.adapter is not None:
        return longest_transfer(0)
    model = build_meta_model(load_config(recipe.model), recipe.model)
    return longest_transfer(sum(weight.numel() * (weight.element_size() + 12) for weight in model.parameters()))


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raise UserError for settings under which a save has no model, or a key of the recipe has no effect."""
    plugin = arguments.deepspeed_plugin
    deepspeed = plugin and plugin.hf_ds_config
    for key in ("sequence_parallel_size", "tensor_parallel.autotp_size") if deepspeed is not None else ():
        if (deepspeed.get_value(key) or 1) > 1:
            raise UserError(
                f"the DeepSpeed configuration has `{key}: {deepspeed.get_value(key)}`, which does not support packed "
                "rows. Remove it. To divide long sequences between GPUs, write `model.sequence_parallel` in the recipe."
            )
    if deepspeed is not None and deepspeed.is_zero3():
        key = "stage3_gather_16bit_weights_on_model_save"
        if not deepspeed.get_value(f"zero_optimization.{key}"):
            raise UserError(
                f"the DeepSpeed configuration lacks `zero_optimization.{key}: true`, so a save would hold DeepSpeed's "
                "partitions and no model. Add it, or launch with accelerate_configs/zero3.yaml."
            )
        if error := hpz_error(deepspeed.config, os.environ):
            raise UserError(error)
        selective = (arguments.gradient_checkpointing_kwargs or {}).get("selective")
        if recipe.adapter is not None and arguments.gradient_checkpointing and selective:
            raise UserError(
                "training.gradient_checkpointing_kwargs: `selective: true` needs non-reentrant checkpointing, and an "
                "adapter under ZeRO-3 needs the reentrant one. Remove selective, or launch with "
                "accelerate_configs/zero2.yaml."
            )
    if deepspeed is not None and deepspeed.get_value("optimizer.type"):
        optim, used = recipe.training.get("optim"), deepspeed.get_value("optimizer.type")
        if optim is not None and not optim.startswith("adamw_torch"):
            raise UserError(
                f"training.optim: {optim} would not be used: the DeepSpeed configuration names its own optimizer, "
                f"{used}. Write adamw_torch, or launch with a configuration that leaves the optimizer to the recipe."
            )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and "FULL_STATE_DICT" not in os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"):
        raise UserError(
            f"fsdp_state_dict_type: {os.environ['FSDP_STATE_DICT_TYPE']} saves FSDP's shards and no model. Write "
            "FULL_STATE_DICT, or launch with accelerate_configs/fsdp2.yaml."
        )
    if recipe.quantization and (fsdp or (deepspeed is not None and deepspeed.is_zero3())):
        _check_storage(recipe)


def _check_storage(recipe: Recipe) -> None:
    """Raise UserError unless 4-bit weights are stored in the model's type: ranks split by it (peft#1550, #2016)."""
    assert recipe.quantization is not None
    storage, dtype = recipe.quantization.bnb_4bit_quant_storage, recipe.model.dtype
    if dtype not in (storage, "auto"):
        raise UserError(
            f"quantization.bnb_4bit_quant_storage: {storage} differs from model.dtype: {dtype}. ZeRO-3 and FSDP need "
            f"weights of one type. Write the same type for both, and for bnb_4bit_compute_dtype."
        )


@contextmanager
def without_zero3(arguments: SFTConfig) -> Iterator[None]:
    """Keep transformers from partitioning, under ZeRO-3, a model that has no weights."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin := arguments.deepspeed_plugin:  # training.deepspeed makes one without dschf
            set_hf_deepspeed_config(getattr(plugin, "dschf", plugin.hf_ds_config))
