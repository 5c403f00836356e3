"""TRL's arguments of a run."""

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
from train.loop.master_weights import FULL_STATE_DICT, Launch
from train.loop.sharding import sharding_error
from train.loop.tracking import tracker_names
from train.model.load import trained_config
from train.model.text_part import build_meta_model
from train.ranks import deepspeed_launch_error, hpz_error, is_launched_by_fsdp, parallelism_error, world_size
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

    While the first rank writes the model, or completes a checkpoint before the next one is written, all others wait in
    the default process group (`CheckpointWriter`), whose timeout this is. The groups of DeepSpeed and of FSDP's meshes
    have NCCL's 10 minutes. A rank that hangs is noticed after the same time.

    The bytes are those of the weights and, per parameter, of a float32 master weight and two moments: 988 GB for a 70B
    in bfloat16. An adapter's are few. DEEPSPEED_TIMEOUT has no effect, as accelerate starts the group before DeepSpeed.
    """
    if world_size() == 1 or recipe.adapter is not None:
        return longest_transfer(0)
    model = build_meta_model(trained_config(recipe), recipe.model)
    return longest_transfer(sum(weight.numel() * (weight.element_size() + 12) for weight in model.parameters()))


def check_sharding(recipe: Recipe, arguments: SFTConfig) -> None:
    """Raise UserError for settings that this run's distribution refuses."""
    plugin = arguments.deepspeed_plugin
    launch = Launch(
        deepspeed=plugin.hf_ds_config.config if plugin else None,
        fsdp=is_launched_by_fsdp(os.environ),
        state_dict=os.environ.get("FSDP_STATE_DICT_TYPE", FULL_STATE_DICT),
    )
    error = sharding_error(recipe, launch) or (hpz_error(launch.deepspeed, os.environ) if launch.deepspeed else None)
    if error:
        raise UserError(error)


@contextmanager
def without_zero3(arguments: SFTConfig) -> Iterator[None]:
    """Keep transformers from partitioning, under ZeRO-3, a model that has no weights."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin := arguments.deepspeed_plugin:  # training.deepspeed makes one without dschf
            set_hf_deepspeed_config(getattr(plugin, "dschf", plugin.hf_ds_config))
