"""Test of an attention kernel on this device: a forward and backward step, compared with plain attention."""

from types import SimpleNamespace

import torch
from transformers import AttentionInterface

_LENGTHS = (37, 128, 91)
_KEY_HEADS = 2
_TOLERANCE = 0.02
"""Allowed error as a share of the largest value. A bfloat16 has 8 significant bits, so each of a few roundings is off
by up to 0.4 %. If a document attends to another, or a gradient is wrong, the error is as large as the values."""


class _Layer(torch.nn.Module):
    """The attributes that a kernel of transformers reads from the layer that calls it."""

    def __init__(self, kernel: str, groups: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=kernel, dtype=dtype)
        self.is_causal, self.layer_idx, self.num_key_value_groups = True, 0, groups


def check_kernel(
    kernel: str,
    *,
    head_size: int,
    groups: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    device: torch.device,
) -> str | None:
    """Run `kernel` on packed documents of random numbers, forward and backward; return an error, or None.

    An installed kernel may lack a backward (FlashAttention 3 often does), a head size or this device. Any `window` is
    tested as one of 64 tokens. The global random state doesn't change.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads = sum(_LENGTHS), groups * _KEY_HEADS
    query, key, value, gradient = (
        torch.randn(1, count, tokens, head_size, generator=generator, device=device).to(dtype)
        for count in (heads, _KEY_HEADS, _KEY_HEADS, heads)
    )
    window = None if window is None else 64
    borders = torch.tensor([0, *_LENGTHS], device=device).cumsum(0).to(torch.int32)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None]
    try:
        output, _ = AttentionInterface()[kernel](
            _Layer(kernel, groups, dtype), *inputs, None,
            scaling=head_size**-0.5, sliding_window=window, softcap=softcap, position_ids=positions,
            cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=max(_LENGTHS), max_length_k=max(_LENGTHS),
        )  # fmt: skip
        actual = [output.transpose(1, 2), *torch.autograd.grad(output.transpose(1, 2), inputs, gradient)]
    except Exception as error:  # of compilers, drivers and kernels, which share no class
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = _plain_attention(exact_inputs[0], exact_inputs[1], exact_inputs[2], borders, window, softcap)
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, gradient.float())]
    for name, ours, reference in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        deviation = (ours.float() - reference).abs().max() / reference.abs().max()
        if not deviation <= _TOLERANCE:  # NaN too
            return f"its {name} on packed documents is off by {deviation.item():.0%}"
    return None


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return causal attention inside each document, [1, heads, tokens, size], with all scores in memory."""
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    positions = torch.arange(tokens, device=query.device)
    documents = torch.bucketize(positions, borders, right=True)
    behind = positions[:, None] - positions[None, :]
    seen = (documents[:, None] == documents[None, :]) & (behind >= 0) & (behind < (window or tokens))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
