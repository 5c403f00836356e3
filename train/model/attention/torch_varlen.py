"""Attention within packed documents with what torch ships, registered with transformers: torch_varlen for GPUs, and
sdpa_by_document for CPUs.

torch.nn.attention.varlen (torch 2.10 and later) is FlashAttention-2 (Dao 2023, arXiv:2307.08691) over one row of tokens
with the borders of its documents; nothing has to be compiled or installed besides torch. It is called through an
operator of our own: TRL's selective checkpointing (training.gradient_checkpointing_kwargs: {selective: true}) keeps
the output of operators with `flash_attn` in their name (selective_activation_checkpointing.py in trl/models, 1.16).
The name of torch's has not, so its output would be computed again.

On a CPU PyTorch's scaled-dot-product attention is FlashAttention too. Over one document after the other it computes
none of the scores between documents, and skips those that lie ahead. Forward and backward of 4,000 tokens in four
documents take 10 us per token; under sdpa's mask they take 73 (4 heads of 16, one core).
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask

NAME = "torch_varlen"
BY_DOCUMENT = "sdpa_by_document"


def register() -> None:
    """Register both with transformers: the kernels, and FlashAttention's masks (2-D or none)."""
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(BY_DOCUMENT, partial(attention, compute=sdpa_by_document))
    for name in (NAME, BY_DOCUMENT):
        AttentionMaskInterface.register(name, flash_attention_mask)


class Kernel(NamedTuple):
    """torch's operators, and the names of their parameters, which differ between 2.10, 2.11 and 2.13."""

    forward: Any
    backward: Any
    forward_parameters: frozenset[str]
    backward_parameters: frozenset[str]

    @staticmethod
    def from_operators(forward: Any, backward: Any) -> "Kernel":
        """Read the parameters from the operators' schemas."""
        schemas = ({argument.name for argument in operator._schema.arguments} for operator in (forward, backward))
        return Kernel(forward, backward, *map(frozenset, schemas))


def _find_kernel() -> Kernel | None:
    """Return torch's kernel; None where it has none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    import torch.nn.attention.varlen  # registers them

    operators = torch.ops.torch_attn
    forward, backward = (getattr(operators, name, None) for name in ("_varlen_attn", "_varlen_attn_backward"))
    return Kernel.from_operators(forward.default, backward.default) if forward and backward else None


KERNEL = _find_kernel()
"""torch's kernel. A constant, as torch.compile can't read an operator's schema: doing so in each call ended the graph
in every layer."""


def kernel_parameters() -> frozenset[str]:
    """Return the parameters of torch's forward operator; empty without a kernel."""
    return KERNEL.forward_parameters if KERNEL else frozenset()


def _call(operator: Any, parameters: frozenset[str], **offered: Any) -> Any:
    """Call the operator with those of the arguments that it accepts."""
    return operator(**{name: value for name, value in offered.items() if name in parameters})


class Documents(NamedTuple):
    """Borders of the documents in one row of tokens."""

    borders: torch.Tensor
    """int32 [documents + 1], from 0 to the number of tokens."""
    longest: int
    """Tokens of the longest document, or an upper bound."""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    compute: Callable[..., torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in transformers' interface: [batch, heads, tokens, size] -> [batch, tokens, heads, value size].

    - Documents are separated by `cu_seq_lens_q` and `max_length_q` (from TRL's collator), else by a padding mask
      [batch, tokens], else by `position_ids` that restart.
    - `key` and `value` may have fewer heads (GQA) and more tokens (a cache: the queries are the last ones), and `value`
      a smaller size (MLA).
    - `compute` has the arguments of `flash_varlen`, which is the default.

    Raises ValueError for what torch's kernel doesn't support: dropout, soft-capping, attention sinks, 4-D masks.
    """
    for feature, used in ("dropout", dropout), ("soft-capping", softcap), ("attention sinks", s_aux is not None):
        if used:
            raise ValueError(f"This attention does not support {feature}. Write another `model.attention`.")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"This attention takes a padding mask [batch, tokens], found {list(attention_mask.shape)}.")
    batch, _, query_tokens, size = query.shape
    target = get_target_dtype(query, module)  # under autocast RoPE and norms in float32 return float32
    if target is not None:
        query, key, value = query.to(target), key.to(target), value.to(target)
    value_size = value.shape[-1]
    if value_size < size:
        value = functional.pad(value, (0, size - value_size))
    key_tokens = key.shape[2]
    query, key, value = (states.transpose(1, 2).reshape(-1, states.shape[1], size) for states in [query, key, value])

    unpadded: torch.Tensor | None = None
    if kwargs.get("cu_seq_lens_q") is not None and attention_mask is None:
        of_queries = Documents(kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"]))
        of_keys = Documents(kwargs["cu_seq_lens_k"], int(kwargs["max_length_k"]))
    elif attention_mask is not None:
        query_mask = attention_mask[:, -query_tokens:].bool()
        key_mask = functional.pad(attention_mask.bool(), (0, key_tokens - attention_mask.shape[1]))
        unpadded, attended = query_mask.flatten().nonzero().squeeze(1), key_mask.flatten().nonzero().squeeze(1)
        query, key, value = query[unpadded], key[attended], value[attended]
        of_queries, of_keys = _of_lengths(query_mask.sum(1)), _of_lengths(key_mask.sum(1))
    elif query_tokens == key_tokens:
        of_queries = of_keys = _of_positions(kwargs.get("position_ids"), batch, query_tokens, query.device)
    else:
        of_queries = _of_equal(batch, query_tokens, query.device)
        of_keys = _of_equal(batch, key_tokens, query.device)

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # FlashAttention-2 itself ignores a window longer than all documents (flash_api.cpp: `window_size_left >=
    # max_seqlen_k`). Where it must not be passed at all is decided here: torch.compile would compile both cases.
    needs_window = "window_size" in kernel_parameters() or sliding_window is None or of_keys.longest > sliding_window
    window = sliding_window if needs_window else None
    scale = size**-0.5 if scaling is None else scaling
    compute = compute or flash_varlen
    output = compute(query, key, value, of_queries, of_keys, scale=scale, causal=causal, window=window)
    if unpadded is not None:
        output = output.new_zeros(batch * query_tokens, *output.shape[1:]).index_copy(0, unpadded, output)
    return output.view(batch, query_tokens, -1, size)[..., :value_size], None


def flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_queries: Documents,
    of_keys: Documents,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Call any version of torch's kernel: `query` [tokens, heads, size] -> the same shape.

    A query attends to the last `window` keys of its document, its own included; None = all. If `causal`, to none after
    it; the last query is at the last key. Raises ValueError for a window that torch's kernel doesn't support (2.10).
    """
    parameters = kernel_parameters()
    if "window_size" not in parameters and window is not None:
        raise ValueError(
            f"{NAME} does not support a sliding window with torch {torch.__version__}: 2.11 or later does."
        )
    if "enable_gqa" not in parameters:  # before 2.12 fewer key heads go unnoticed
        key, value = _repeat_heads(query, key, value)
    if "scale" not in parameters:
        query = query * (scale * query.shape[-1] ** 0.5)
    behind = -1 if window is None else window - 1
    sides = [behind, 0 if causal else behind]
    output, *_ = _varlen(
        query, key, value, of_queries.borders, of_keys.borders, of_queries.longest, of_keys.longest, scale, sides
    )
    return output


def sdpa_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_queries: Documents,
    of_keys: Documents,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Return what `flash_varlen` does, computed by PyTorch's attention for one document after the other."""
    key, value = _repeat_heads(query, key, value)
    lengths = [documents.borders.diff().tolist() for documents in (of_queries, of_keys, of_keys)]
    outputs = []
    for tensors in zip(*map(torch.split, (query, key, value), lengths), strict=True):
        queries, keys, values = (states.transpose(0, 1)[None] for states in tensors)  # [1, heads, tokens, size]
        tokens, key_tokens = queries.shape[2], keys.shape[2]
        mask = None
        if tokens != key_tokens or (window is not None and key_tokens > window):
            behind = torch.arange(key_tokens - tokens, key_tokens)[:, None] - torch.arange(key_tokens)
            longest = key_tokens if window is None else window
            mask = ((behind < longest) & (behind >= (0 if causal else 1 - longest))).to(query.device)
        output = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _repeat_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [tokens, heads, size] with as many heads as the queries have."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the operator of torch.nn.attention.varlen.varlen_attn: output, log-sum-exp, and an unused random state."""
    assert KERNEL is not None, f"torch {torch.__version__} has no kernel for variable lengths"
    return _call(
        KERNEL.forward, KERNEL.forward_parameters,
        query=query, key=key, value=value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, max_q=max_q, max_k=max_k,
        is_causal=window_size == [-1, 0], scale=scale, window_size=window_size,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]
) -> None:  # torch passes them by name
    tensors, ctx.numbers = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, cu_seq_q, cu_seq_k, out, lse, rng_state = ctx.saved_tensors
    max_q, max_k, scale, window_size = ctx.numbers
    assert KERNEL is not None
    gradients = _call(
        KERNEL.backward, KERNEL.backward_parameters,
        grad_out=gradient, query=query, key=key, value=value, out=out, lse=lse, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k,
        max_q=max_q, max_k=max_k, is_causal=window_size == [-1, 0], rng_state=rng_state, scale=scale,
        window_size=window_size,
    )  # fmt: skip
    return (*gradients, None, None, None, None, None, None)


_varlen = torch.library.custom_op("janus_flash_attn::varlen", _forward, mutates_args=())
_varlen.register_fake(_forward)
_varlen.register_autograd(_backward, setup_context=_save_for_backward)


def _of_lengths(lengths: torch.Tensor) -> Documents:
    borders = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Documents(borders, int(lengths.max()))


def _of_equal(batch: int, tokens: int, device: torch.device) -> Documents:
    return Documents(torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device), tokens)


def _of_positions(positions: torch.Tensor | None, batch: int, tokens: int, device: torch.device) -> Documents:
    """Return documents that begin with each row and wherever a position isn't the previous one plus 1."""
    if positions is None or positions.ndim != 2 or positions.shape[1] != tokens:
        return _of_equal(batch, tokens, device)
    begins = functional.pad(positions.diff(dim=1) != 1, (1, 0), value=True).expand(batch, tokens)
    starts = begins.flatten().nonzero().squeeze(1).to(device, torch.int32)
    borders = torch.cat([starts, starts.new_tensor([batch * tokens])])
    return Documents(borders, int(borders.diff().max()))
