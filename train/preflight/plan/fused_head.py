"""Allocations of TRL's fused output layer as they are on a GPU, where its tiles of logits are changed in place."""

from typing import Any

import torch

TOKEN_CHUNK, VOCABULARY_CHUNK = 4_096, 32_768
"""Size of TRL's tiles of logits: TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py and _CHUNKED_LOGPROB_CHUNK_SIZE in
trl/trainer/utils.py (1.16)."""


class FusedHeadAllocations(torch.autograd.Function):
    """Stand-in for ChunkedLogProbFunction (trl/kernels/chunked_logprob.py, 1.16) that allocates and computes nothing.

    TRL's own function needs a GPU for its Triton kernels; its CPU form copies each tile several times. On a GPU it
    holds at once:

    - a tile of logits [tokens, vocabulary] of TOKEN_CHUNK x VOCABULARY_CHUNK elements;
    - seven float32 statistics a token in the forward pass;
    - the gradients of the hidden states and, where it is trained, of the weight in float32, and once more in the dtype
      of their inputs;
    - under autocast the casts of a tile's hidden states and of its part of the weight; in the backward pass a new part
      is cast before the last one is freed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        vocabulary_chunk: int = VOCABULARY_CHUNK,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities, entropies and top-1 hits. `hidden`: [tokens, hidden]; `weight`: [vocabulary,
        hidden]."""
        device = hidden.device.type
        ctx.set_materialize_grads(False)
        ctx.compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.vocabulary_chunk = vocabulary_chunk
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty((min(len(hidden), TOKEN_CHUNK), vocabulary_chunk), dtype=ctx.compute_dtype)
        tokens = hidden[:TOKEN_CHUNK].to(ctx.compute_dtype)
        weight[:vocabulary_chunk].to(ctx.compute_dtype)
        largest, total, weighted, _, before, target = statistics[:6]
        log_z = largest + torch.log(total)
        log_probabilities = target - log_z
        entropy = log_z - weighted / total
        is_top1 = (target >= largest) & (target > before)
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.mark_non_differentiable(is_top1)
        del tile, tokens
        return log_probabilities, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the hidden states, the weight and the bias."""
        hidden, weight, bias, *_ = ctx.saved_tensors
        inputs = (hidden, weight, bias)
        sums = [
            torch.zeros(tensor.shape, device=tensor.device, dtype=torch.float32) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        dtype, columns = ctx.compute_dtype, ctx.vocabulary_chunk
        tile = hidden.new_empty((min(len(hidden), TOKEN_CHUNK), columns), dtype=dtype)
        tokens = hidden[:TOKEN_CHUNK].to(dtype)
        part = weight[:columns].to(dtype)
        if len(hidden) > TOKEN_CHUNK or len(weight) > columns:
            part = weight[:columns].to(dtype)
        gradients = tuple(
            None if total is None else total.to(tensor.dtype) for total, tensor in zip(sums, inputs, strict=True)
        )
        del tile, tokens, part
        return (*gradients, None, None)
