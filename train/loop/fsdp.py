"""FSDP2's settings of a run: precision, gradients of several micro-batches, and the output layer of the fused loss."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from trl import SFTConfig

from train.errors import UserError
from train.model.load import trained_config
from train.model.text_part import build_meta_model
from train.ranks import is_launched_by_fsdp
from train.recipe import Recipe


def is_fsdp2(arguments: SFTConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the run is sharded by FSDP2, by `training.fsdp` or by the launch configuration."""
    if arguments.fsdp:
        return (arguments.fsdp_plugin_args or {}).get("fsdp_version") == 2
    return is_launched_by_fsdp(environment) and environment.get("FSDP_VERSION") == "2"


def check_in_force(arguments: SFTConfig, accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if FSDP is asked for and accelerate has ignored it, as it does on CPUs."""
    if (arguments.fsdp or is_launched_by_fsdp(environment)) and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP: accelerate shards on GPUs only, and each process here would train all weights. Launch with "
            "accelerate_configs/ddp.yaml (one process: cpu.yaml)."
        )


def configure_fsdp2(arguments: SFTConfig) -> None:
    """Reduce gradients in float32 and after each micro-batch, and return losses in float32.

    - Policy: accelerate would set bf16 for gradients on their way between ranks, and for all outputs, among them the
      losses of tokens: 6.15625 for 6.16406. Without `output_dtype` activations stay in the type of computation, and
      losses in the float32 in which the fused head computes them.
    - `sync_each_batch`: without it each rank keeps the gradients of the whole model, in the type of reduction, until
      the last micro-batch of a step (4 bytes per parameter: 29 GB for a 7B). It costs a reduce-scatter for each
      micro-batch. `training.accelerator_config` may turn it off.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    arguments.fsdp_plugin_args = {**(arguments.fsdp_plugin_args or {}), "mixed_precision_policy": policy}
    config = arguments.accelerator_config
    config.gradient_accumulation_kwargs = {"sync_each_batch": True, **(config.gradient_accumulation_kwargs or {})}


def check_tied_modules(recipe: Recipe) -> None:
    """Raise UserError for an adapter with a trained copy of a layer whose weight the model shares with another.

    accelerate ties such weights again while it shards (`fsdp2_prepare_model`): a copy of the output layer ends in an
    error, and with a copy of the embedding the frozen output layer would silently become that copy.
    """
    names = (recipe.adapter.modules_to_save if recipe.adapter else None) or ()
    model = build_meta_model(trained_config(recipe), recipe.model) if names else None
    output = model and model.get_output_embeddings()  # a reward model has none
    if model is None or output is None or output.weight is not model.get_input_embeddings().weight:
        return
    ends = {id(output), id(model.get_input_embeddings())}
    tied = [f".{name}" for name, module in model.named_modules() if id(module) in ends]
    for name in names:
        if any(full_name.endswith(f".{name}") for full_name in tied):
            raise UserError(
                f"adapter.modules_to_save: {name} shares its weight with another layer of {recipe.model.name_or_path}, "
                "and FSDP2 would tie the adapter's copy to it. Remove it, or launch with accelerate_configs/zero2.yaml."
            )


def gather_output_layer(model: Any) -> None:
    """Gather the weights of the output layer before each forward pass of `model`, which FSDP2 has sharded.

    TRL's fused head reads the output layer's weight instead of calling the layer, and FSDP2 gathers in a layer's call.
    Mostly the final norm is in one group with the output layer, and its call gathers both. Where the output layer is
    alone (under an adapter, in a multimodal model), its weight would stay a DTensor, which TRL gathers by itself: not
    in the type of computation, and a trained one would get the gradient of one rank and not the mean of all.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        model.register_forward_pre_hook(lambda *_: head.unshard())
