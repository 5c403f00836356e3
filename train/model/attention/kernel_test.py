"""One step of an attention kernel on this device, beside the same in plain arithmetic: before a model relies on it."""

from types import SimpleNamespace

import torch
from transformers import AttentionInterface

_LENGTHS = (37, 128, 91)
_KEY_HEADS = 2
_TOLERANCE = 0.02
"""Of the largest value. A bfloat16 holds 8 bits, so each of a few roundings is off by up to 0.4 %; a document that sees
another, or a wrong gradient, is off by as much as the values themselves."""


class _Layer(torch.nn.Module):
    """What a kernel of transformers' reads of the layer that calls it."""

    def __init__(self, kernel: str, groups: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=kernel, dtype=dtype)
        self.is_causal, self.layer_idx, self.num_key_value_groups = True, 0, groups


def trial(
    kernel: str,
    *,
    head_size: int,
    groups: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    device: torch.device,
) -> str | None:
    """What is wrong with `kernel` on packed documents of random numbers, forward and backward; None if it is right.

    A kernel may be installed and yet lack a backward (FlashAttention 3 often does), a head size or this device. The
    global state of random numbers is left alone. With a `window`, one of 64 stands for it.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads = sum(_LENGTHS), groups * _KEY_HEADS
    query, key, value, wanted = (
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
        found = [output.transpose(1, 2), *torch.autograd.grad(output.transpose(1, 2), inputs, wanted)]
    except Exception as fault:  # of compilers, drivers and kernels, which share no class
        return (str(fault).strip() or type(fault).__name__).splitlines()[0]
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = _plain_attention(exact_inputs[0], exact_inputs[1], exact_inputs[2], borders, window, softcap)
    right = [exact, *torch.autograd.grad(exact, exact_inputs, wanted.float())]
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, right, strict=True):
        error = (one.float() - other).abs().max() / other.abs().max()
        if not error <= _TOLERANCE:  # NaN too
            return f"its {name} on packed documents is off by {error.item():.0%}"
    return None


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention inside each document, [1, heads, tokens, size], with all scores written out."""
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    places = torch.arange(tokens, device=query.device)
    documents = torch.bucketize(places, borders, right=True)
    behind = places[:, None] - places[None, :]
    seen = (documents[:, None] == documents[None, :]) & (behind >= 0) & (behind < (window or tokens))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
