"""Sequence parallelism (DeepSpeed-Ulysses): the ranks of a group share each sequence of packed documents.

rank                 0           1           2           3
tokens           [ a a a b | b b b b | b b c c | c c d d ]     embeddings, linear layers, norms, loss: tokens / P
all-to-all       [tokens / P, heads] -> [tokens, heads / P]
attention        a a a b b b b b b b c c c c d d               any kernel for packed documents, all tokens, heads / P
all-to-all       [tokens, heads / P] -> [tokens / P, heads]

- Method: Jacobs et al. 2023, arXiv:2309.14509; with any attention kernel: Arctic Long Sequence Training (Bekman et al.
  2025, arXiv:2506.13996). Exact: no token's result depends on the number of ranks, but for rounding.
- Communication of a layer and rank, forward: 2 x (tokens / P) x hidden size elements for queries and outputs, and the
  same for keys and values in proportion to their heads.
- A batch takes part if it has the group under GROUP, and with it the borders of all of its documents
  (`cu_seq_lens_q`). Any other forward pass, as of an evaluation that each rank does alone, is as without this module.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype

from train.errors import UserError
from train.model.attention.selection import Needs
from train.recipe import Recipe

GROUP = "sequence_parallel_group"
"""Argument of the model, passed on to its attention layers: the process group that shares the sequence."""
_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class UlyssesAttention:
    """Attention in transformers' interface that exchanges tokens for heads around a `kernel` of that interface."""

    name: str
    kernel: Any

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention: [1, heads, tokens / P, size] -> [1, tokens / P, heads, value size].

        Without a GROUP: as the kernel does. Raises UserError for attention sinks, which belong to heads.
        """
        group = kwargs.pop(GROUP, None)
        if group is None:
            return self.kernel(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("s_aux") is not None:
            raise UserError("model.sequence_parallel does not support attention sinks, which this model has. Write 1.")
        kwargs.pop("position_ids", None)  # of this rank's tokens; the borders are those of all documents
        target = get_target_dtype(query, module)  # under autocast RoPE and norms in float32 return float32
        if target is not None:
            query, key, value = query.to(target), key.to(target), value.to(target)
        copies = shared_heads(query.shape[1], key.shape[1], group.size()) // key.shape[1]
        if copies > 1:
            key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
        query, key, value = (tokens_to_heads(states, group) for states in (query, key, value))
        kernel = _masked_attention if self.name == "sdpa" else self.kernel
        output, _ = kernel(module, query, key, value, None, **kwargs)
        return heads_to_tokens(output, group), None


def register(kernel: str) -> None:
    """Register UlyssesAttention with transformers, around the kernel and under its name.

    Raises UserError for a kernel whose masks the model makes itself, of the tokens that it sees.
    """
    _refuse_kernel(kernel)
    registered = AttentionInterface()[kernel]
    if not isinstance(registered, UlyssesAttention):
        AttentionInterface.register(kernel, UlyssesAttention(kernel, registered))


def check_sequence_parallel(recipe: Recipe, model: PreTrainedModel, needs: Needs, kernel: str) -> None:
    """Raise UserError if the sequences of `model` can't be divided as the recipe says; it may be without weights.

    `needs`, `kernel`: as selected for its attention.
    """
    size, text = recipe.model.sequence_parallel, model.config.get_text_config()
    if size == 1:
        return
    key, name = f"model.sequence_parallel: {size}", recipe.model.name_or_path
    counts = getattr(text, "num_attention_heads", None) or 0
    heads = math.gcd(*counts) if isinstance(counts, list) else counts
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYERS)
    if others or model._is_stateful or not heads:
        kinds = f" ({', '.join(others)})" if others else ""
        raise UserError(f"{key} needs layers of attention, and {name} has others{kinds}. Write 1.")
    router_loss = recipe.training.get("router_aux_loss_coef", getattr(text, "router_aux_loss_coef", None))
    if hasattr(text, "output_router_logits") and router_loss != 0:
        raise UserError(
            f"{key}: the load-balancing loss of {name}'s router needs all tokens of a sequence. Write 1, or "
            "`training.router_aux_loss_coef: 0.0`."
        )
    if not needs.registered:
        raise UserError(f"{key} is not supported by the code of {name}. Write 1.")
    if heads % size:
        allowed = ", ".join(str(divisor) for divisor in range(1, heads + 1) if heads % divisor == 0)
        raise UserError(f"{key} does not divide the {heads} attention heads of {name}. Allowed: {allowed}.")
    _refuse_kernel(kernel, chosen=recipe.model.attention == "auto")


def _refuse_kernel(kernel: str, *, chosen: bool = True) -> None:
    """Raise UserError for a kernel that makes masks. `chosen`: by `auto`, so that no other kernel is there."""
    if kernel in ("eager", "flex_attention"):
        remedy = "Install a FlashAttention that supports this model" if chosen else "Write `model.attention: auto`"
        raise UserError(
            f"model.sequence_parallel does not support the attention kernel {kernel}, whose mask is made from the "
            f"tokens of one process. {remedy}, or write 1."
        )


def shared_heads(heads: int, key_heads: int, size: int) -> int:
    """Return the number of key-value heads, copies included, that `size` ranks can share as the queries are shared.

    Rank r computes `heads / size` consecutive query heads. Its share of the result is the key-value heads of these.
    """
    shared = math.lcm(key_heads, size)
    return shared if heads % shared == 0 else heads


def tokens_to_heads(states: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Exchange tokens for heads: [1, heads, tokens / P, size] -> [1, heads / P, tokens, size].

    The result's memory is in order of the tokens, as FlashAttention reads it.
    """
    parts = states[0].unflatten(0, (group.size(), -1)).transpose(1, 2)  # [P, tokens / P, heads / P, size]
    return _AllToAll.apply(parts, group).flatten(0, 1).transpose(0, 1)[None]


def heads_to_tokens(states: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Exchange heads for tokens: [1, tokens, heads / P, size] -> [1, tokens / P, heads, size]."""
    parts = states[0].unflatten(0, (group.size(), -1))  # [P, tokens / P, heads / P, size]
    return _AllToAll.apply(parts, group).transpose(0, 1).flatten(1, 2)[None]


class _AllToAll(torch.autograd.Function):
    """Exchange of row i of each rank with rank i: [P, ...] -> [P, ...]."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None


def _masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute PyTorch's attention under the mask of all documents, which the model can't make from a part of them."""
    assert softcap is None, "sdpa does not support soft-capping"
    positions = torch.arange(query.shape[2], device=query.device)
    documents = torch.bucketize(positions, cu_seq_lens_q, right=True)
    behind = positions[:, None] - positions
    mask = (documents[:, None] == documents) & (behind >= 0) & (behind < (sliding_window or len(positions)))
    output = functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2), None
