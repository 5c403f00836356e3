"""Test of an attention kernel on this device: a forward and backward step, compared with plain attention."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.hub_kernels import is_kernel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from train.model.hub_kernels import is_trusted

DOCUMENTS = (37, 1, 300, 128, 1, 91)
"""Tokens of the packed documents: single tokens, a whole block of a kernel (128), and more than two of them."""
_KEY_HEADS = 2
_WINDOW = 64
_SOFTCAP = 2.0
"""Tested instead of the model's own (30 to 50), which changes scores of about 1 by less than the kernels' roundings:
a kernel that ignores it would pass."""
_TOLERANCE = 0.02
"""Allowed error as a share of the largest value. A bfloat16 has 8 significant bits, so each of a few roundings is off
by up to 0.4 %. If a document attends to another, or a gradient is wrong, the error is as large as the values."""
_UNIT = 0.5
"""Order of the random inputs: the gradients of a single token's query and key are 0, up to rounding."""


class _Layer(torch.nn.Module):
    """The attributes that a kernel of transformers reads from the layer that calls it."""

    def __init__(self, kernel: str, groups: int, window: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=kernel, dtype=dtype, sliding_window=window)
        self.is_causal, self.layer_idx, self.num_key_value_groups = True, 0, groups
        # its type is that to which queries are cast; on "meta" it draws no random numbers
        self.projection = torch.nn.Linear(1, 1, dtype=dtype, device="meta")


def check_kernel(
    kernel: str,
    *,
    head_size: int,
    groups: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    device: torch.device,
    sinks: bool = False,
    documents: Sequence[int] = DOCUMENTS,
) -> str | None:
    """Run `kernel` on packed documents of random numbers, forward and backward; return an error, or None.

    An installed kernel may lack a backward (FlashAttention 3 often does, flash-attn2 v3 of the hub where heads share
    keys: trl#6986), a head size or this device. A kernel of the hub is downloaded where it isn't cached. Any `window`
    is tested as one of 64 tokens, any `softcap` as 2; `sinks`: one learnable logit per head, to which every query
    attends. The global random state doesn't change.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens, heads = sum(documents), groups * _KEY_HEADS
    shapes = [(1, heads, tokens), (1, _KEY_HEADS, tokens), (1, _KEY_HEADS, tokens), (1, heads, tokens)]
    query, key, value, gradient = (
        torch.randn(*shape, head_size, generator=generator, device=device).to(dtype) for shape in shapes
    )
    window, softcap = None if window is None else _WINDOW, None if softcap is None else _SOFTCAP
    borders = torch.tensor([0, *documents], device=device).cumsum(0).to(torch.int32)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    if sinks:
        inputs.append(torch.randn(heads, generator=generator, device=device).to(dtype).requires_grad_())
    try:
        if is_kernel(kernel):
            lazy_import_flash_attention(kernel, allow_all_kernels=not is_trusted(kernel))
        output = _run(kernel, inputs, documents, borders, groups=groups, window=window, softcap=softcap)
        actual = [output, *torch.autograd.grad(output, inputs, gradient)]
    except Exception as error:  # of compilers, drivers and kernels, which share no class
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = _plain_attention(exact_inputs, borders, window, softcap)
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, gradient.float())]
    for name, ours, reference in zip(("output", "dq", "dk", "dv", "dsink"), actual, expected, strict=False):
        size = max(reference.abs().max().item(), _UNIT)
        deviation = (ours.float() - reference).abs().max() / size
        if not deviation <= _TOLERANCE:  # NaN too
            return f"its {name} on packed documents is off by {deviation.item():.0%}"
    return None


def _run(
    kernel: str,
    inputs: Sequence[torch.Tensor],
    documents: Sequence[int],
    borders: torch.Tensor,
    *,
    groups: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Call `kernel` as a model of transformers does, with the mask that it gets there (none for FlashAttention)."""
    query, key, value, *sinks = inputs
    layer = _Layer(kernel, groups, window, query.dtype)
    positions = torch.cat([torch.arange(length, device=query.device) for length in documents])[None]
    create_mask: Any = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = create_mask(layer.config, query[:, 0], None, None, positions)
    output, _ = AttentionInterface()[kernel](
        layer, query, key, value, mask,
        scaling=query.shape[-1] ** -0.5, sliding_window=window, softcap=softcap, position_ids=positions,
        cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=max(documents), max_length_k=max(documents),
        **({"s_aux": sinks[0]} if sinks else {}),
    )  # fmt: skip
    return output.transpose(1, 2)


def _plain_attention(
    inputs: Sequence[torch.Tensor], borders: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Return causal attention inside each document, [1, heads, tokens, size], with all scores in memory."""
    query, key, value, *sinks = inputs
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    positions = torch.arange(tokens, device=query.device)
    documents = torch.bucketize(positions, borders, right=True)
    behind = positions[:, None] - positions[None, :]
    seen = (documents[:, None] == documents[None, :]) & (behind >= 0) & (behind < (window or tokens))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks:  # another column of scores, whose value is 0
        scores = torch.cat([scores, sinks[0].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., :tokens] @ value
