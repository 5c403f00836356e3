"""FSDP2's settings of a run: precision, gradients of several micro-batches, and the output layer of the fused loss."""

import os
from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from trl import SFTConfig


def is_fsdp2(arguments: SFTConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the run is sharded by FSDP2, by `training.fsdp` or by the launch configuration."""
    if arguments.fsdp_plugin_args is not None:
        return arguments.fsdp_plugin_args["fsdp_version"] == 2
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and environment.get("FSDP_VERSION") == "2"


def configure_fsdp2(arguments: SFTConfig) -> None:
    """Reduce gradients in float32 and after each micro-batch, and return losses in float32.

    - Policy: accelerate would set bf16 for gradients on their way between ranks, and for all outputs, among them the
      losses of tokens: 6.15625 for 6.16406. Without `output_dtype` activations stay in the type of computation, and
      losses in the float32 in which the fused head computes them.
    - `sync_each_batch`: without it FSDP2 keeps the unsharded gradients of the whole model on each rank until the last
      micro-batch of a step (13.5 GiB for a 7B in bf16). It costs a reduce-scatter for each micro-batch, as ZeRO-2 and
      -3 have it. `training.accelerator_config` may turn it off.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arguments.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    arguments.fsdp_plugin_args = {**(arguments.fsdp_plugin_args or {}), "mixed_precision_policy": policy}
    config = arguments.accelerator_config
    config.gradient_accumulation_kwargs = {"sync_each_batch": True, **(config.gradient_accumulation_kwargs or {})}


def gather_output_layer(model: torch.nn.Module) -> None:
    """Gather the weights of the output layer before each forward pass of `model`, which FSDP2 has sharded.

    TRL's fused head reads the output layer's weight instead of calling the layer, and FSDP2 gathers in a layer's call.
    Mostly the final norm is in one group with the output layer, and its call gathers both. Where the output layer is
    alone (under an adapter, in a multimodal model), its weight would stay a DTensor, which TRL gathers by itself: not
    in the type of computation, and a trained one would get the gradient of one rank and not the mean of all.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        model.register_forward_pre_hook(lambda *_: head.unshard())
