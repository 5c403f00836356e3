"""Trace of a training step: the bytes that are live at each allocation of one forward and backward pass.

The tensors are fake: they have shapes, dtypes and storages, and no memory. The operations are those of the real model
class, of peft, of torch's checkpointing and of its autograd, so what they keep and free needs no formula.

    begin | layer 0 | layer 1 | ... | head | (autocast ends) | head | ... | layer 1 | layer 0 | end
    embedding          forward                                  backward                       embedding
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.model.attention.torch_varlen import KERNEL
from train.model.classifier import find_score_head
from train.preflight.plan.fused_head import FusedHeadAllocations

_BLOCK = 512
"""Bytes that CUDA's caching allocator rounds each allocation up to (kMinBlockSize in c10/cuda)."""


@dataclass
class Segment:
    """A part of a step. `start`: live bytes at its beginning; `live`: after each allocation in it."""

    name: str
    start: int
    live: list[int] = field(default_factory=list)


class AllocationLog(TorchDispatchMode):
    """Context that logs the live bytes of all storages that operations return, by segment.

    `existing` are storages from before, which don't count: weights, gradients of the last micro-batch.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._live = 0
        for tensor in existing:
            self._watch(tensor, 0)

    @property
    def live(self) -> int:
        """Bytes of the storages that live."""
        return self._live

    def begin(self, name: str) -> None:
        """Begin a segment."""
        self.segments.append(Segment(name, self._live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        before = self._live
        for tensor in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        workspace = self._workspace(func, args, kwargs or {})
        if self.segments and (self._live > before or workspace):
            self.segments[-1].live.append(self._live + workspace)
        return output

    def _watch(self, tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        if size is None:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._live += size
        self._storages[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._live -= size
            del self._storages[key]

        return forget

    def _workspace(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the bytes that FlashAttention-2's backward needs besides its outputs (mha_varlen_bwd, flash_api.cpp).

        The gradient of the queries is summed in float32, a float32 is kept for each head and token, and with fewer key
        heads there is a gradient of keys and values for each query head. FlashAttention 3 needs less of the last.
        """
        if KERNEL is None or func is not KERNEL.backward:
            return 0
        query, key = (kwargs[name] if name in kwargs else args[place] for place, name in ((1, "query"), (2, "key")))
        tokens, heads, size = query.shape
        expanded = 2 * query.numel() * query.element_size() if key.shape[1] != heads else 0
        return int(4 * tokens * heads * (size + 1) + expanded)


def trace_step(
    model: torch.nn.Module, layers: torch.nn.ModuleList, inputs: dict[str, Any], *, autocast: torch.dtype | None
) -> list[Segment]:
    """Trace the forward and backward pass of the second micro-batch of a step: gradients exist.

    A model in evaluation mode is traced as a batch of an evaluation: forward alone, and without gradients.

    Args:
        model: causal language model on fake tensors.
        layers: its decoder layers.
        inputs: of its backbone.
        autocast: dtype of matrix products under autocast; None without.

    Returns:
        list: the segments in their order: `begin`, `forward N` of each layer, `head forward`, `head backward`,
            `backward N` of each layer, `end`. Those of gradients that don't exist (LoRA's first layer, evaluation) are
            missing.
    """
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    existing = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *model.buffers()]
    log = AllocationLog([*existing, *(value for value in inputs.values() if isinstance(value, torch.Tensor))])
    with _marked(layers, log), log:
        log.begin("begin")
        with (
            torch.set_grad_enabled(model.training),
            torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext(),
        ):
            loss = _loss(model, log, inputs)
        if model.training:
            log.begin("head backward")
            loss.backward()
    return log.segments


def _loss(model: Any, log: AllocationLog, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the loss as the forward of trl's add_fused_lm_head does, with all tokens trained."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    if (score_head := find_score_head(model)) is not None:
        return score_head(hidden).sum()
    head = model.get_output_embeddings()
    tokens = hidden.shape[0] * hidden.shape[1]
    index, targets = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
    trained = hidden.reshape(tokens, -1).index_select(0, index)
    log_probabilities, *_ = FusedHeadAllocations.apply(trained, head.weight, head.bias, targets)
    return -log_probabilities.sum()


@contextlib.contextmanager
def _marked(layers: torch.nn.ModuleList, log: AllocationLog) -> Iterator[None]:
    """Begin a segment where a layer's forward and backward pass begin. The layers are called in their order."""
    handles: list[Any] = []
    calls = 0

    def on_gradient(tensor: Any, name: str) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: log.begin(name))

    def before(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal calls
        if calls >= len(layers):  # computed again in the backward pass
            return
        log.begin(f"forward {calls}")
        on_gradient(args[0] if args else kwargs.get("hidden_states"), f"backward {calls - 1}" if calls else "end")
        calls += 1

    def after(_: Any, __: Any, output: Any) -> None:
        if calls == len(layers) and not any(segment.name == "head forward" for segment in log.segments):
            log.begin("head forward")
            on_gradient(output[0] if isinstance(output, tuple) else output, f"backward {calls - 1}")

    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
