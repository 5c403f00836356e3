"""TRL's arguments of a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTConfig

from train.errors import UserError
from train.launched import deepspeed_fault
from train.loop.sharding import check_sharding
from train.loop.tracking import integrations
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
    if fault := deepspeed_fault(settings.get("deepspeed"), os.environ):
        raise UserError(fault)
    with as_user_error("training"):
        arguments = SFTConfig(**settings)
    check_sharding(recipe, arguments)
    return arguments
