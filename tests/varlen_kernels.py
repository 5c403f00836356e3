"""Stand-ins for torch's attention kernel of variable lengths, which needs CUDA: the same schemas, computed by loops."""

from collections import Counter
from collections.abc import Iterator
from functools import cache

import torch

from train.model.attention.torch_varlen import Kernel


def masks(cu_seq_q, cu_seq_k, sides: list[int]) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield each document's queries, keys and mask; the last query is at the last key."""
    borders_q, borders_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    for start_q, end_q, start_k, end_k in zip(borders_q, borders_q[1:], borders_k, borders_k[1:], strict=False):
        behind = torch.arange(end_q - start_q)[:, None] + (end_k - start_k) - (end_q - start_q)
        behind = behind - torch.arange(end_k - start_k)
        seen = (behind <= sides[0] if sides[0] >= 0 else True) & (
            behind >= -sides[1] if sides[1] >= 0 else behind == behind
        )
        yield slice(start_q, end_q), slice(start_k, end_k), seen


def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, sides) -> tuple[torch.Tensor, ...]:
    """Compute attention document by document, [tokens, heads, size], and log-sum-exp, [heads, tokens]."""
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (query.shape[0], key.shape[0])
    assert max_q >= cu_seq_q.diff().max()
    assert max_k >= cu_seq_k.diff().max()
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    outputs, logs = [], []
    for mine, theirs, seen in masks(cu_seq_q, cu_seq_k, sides):
        scores = torch.einsum("qhd,khd->hqk", query[mine], key[theirs]) * scale
        logs.append(scores.masked_fill(~seen, -torch.inf).logsumexp(-1))
        shares = (scores - logs[-1][..., None]).exp() * seen
        outputs.append(torch.einsum("hqk,khd->qhd", shares, value[theirs]))
    return torch.cat(outputs), torch.cat(logs, dim=1), torch.zeros(2, dtype=torch.uint64)


def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, scale, sides) -> tuple[torch.Tensor, ...]:
    """Compute gradients document by document from output and log-sum-exp (Dao et al., arXiv:2205.14135, appendix B.2)."""
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    dq, dk, dv = torch.zeros_like(query), torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for mine, theirs, seen in masks(cu_seq_q, cu_seq_k, sides):
        scores = torch.einsum("qhd,khd->hqk", query[mine], wide_key[theirs]) * scale
        shares = (scores - lse[:, mine, None]).exp() * seen
        dv[theirs] = torch.einsum("hqk,qhd->khd", shares, grad_out[mine])
        weighted = (grad_out[mine] * out[mine]).sum(-1).T[..., None]
        ds = shares * (torch.einsum("qhd,khd->hqk", grad_out[mine], wide_value[theirs]) - weighted) * scale
        dq[mine] = torch.einsum("hqk,khd->qhd", ds, wide_key[theirs])
        dk[theirs] = torch.einsum("hqk,qhd->khd", ds, query[mine])
    return dq, *(tensor.unflatten(1, (-1, groups)).sum(2) for tensor in (dk, dv))


VERSIONS = {
    "2.10": ("", ""),
    "2.11": (", float? scale=None, int[]? window_size=None",) * 2,
    "2.13": (
        ", float? scale=None, int[]? window_size=None, bool enable_gqa=False, Tensor? seqused_k=None, "
        "Tensor? block_table=None, int? num_splits=None",
        ", float? scale=None, int[]? window_size=None",
    ),
}
"""Parameters of torch's two operators after `is_causal` (and `rng_state`), from torch/nn/attention/varlen.py."""
RUNS: Counter[str] = Counter()


_LIBRARIES: list[torch.library.Library] = []
"""Operators exist as long as their library."""


@cache
def stand_in_kernel(version: str) -> Kernel:
    """Return operators with the schema of a version of torch's, computed by the loops above, forward and backward."""
    library = torch.library.Library(f"stand_in_{version.replace('.', '_')}", "DEF")
    _LIBRARIES.append(library)
    queries = "Tensor query, Tensor key, Tensor value"
    lengths = "Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, SymInt max_k"
    forward_parameters, backward_parameters = VERSIONS[version]
    library.define(
        f"_varlen_attn({queries}, {lengths}, bool is_causal=False{forward_parameters}) -> (Tensor, Tensor, Tensor)"
    )
    library.define(
        f"_varlen_attn_backward(Tensor grad_out, {queries}, Tensor out, Tensor lse, {lengths}, bool is_causal, "
        f"Tensor rng_state{backward_parameters}) -> (Tensor, Tensor, Tensor)"
    )

    def how(size, is_causal=False, scale=None, window_size=None, **beside) -> tuple[float, list[int]]:
        assert set(beside) <= {"enable_gqa"}
        assert window_size is None or is_causal == (window_size == [-1, 0])
        return size**-0.5 if scale is None else scale, window_size or [-1, 0 if is_causal else -1]

    def run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options) -> tuple[torch.Tensor, ...]:
        RUNS["forward"] += 1
        assert query.shape[1] == key.shape[1] or options["enable_gqa"]
        return forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *how(query.shape[2], **options))

    def run_backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, rng_state, **options) -> tuple[torch.Tensor, ...]:  # fmt: skip
        RUNS["backward"] += 1
        return backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, *how(query.shape[2], **options))

    def shapes(query, key, value, *lengths, **options) -> tuple[torch.Tensor, ...]:
        logs = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        return torch.empty_like(query), logs, query.new_empty(2, dtype=torch.uint64)

    def backward_shapes(grad_out, query, key, value, *lengths, **options) -> tuple[torch.Tensor, ...]:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    operators = []
    for name, function, fake in (
        ("_varlen_attn", run, shapes),
        ("_varlen_attn_backward", run_backward, backward_shapes),
    ):
        operator = getattr(getattr(torch.ops, library.ns), name).default
        names = [argument.name for argument in operator._schema.arguments]
        library.impl(
            name,
            lambda *given, _run=function, _names=names, **options: _run(
                **dict(zip(_names, given, strict=False)), **options
            ),
            "CPU",
        )
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        operators.append(operator)
    return Kernel.from_operators(*operators)
