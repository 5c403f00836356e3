"""Bytes that a forward and backward pass hold, from traces of a few layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from train.errors import UserError
from train.preflight.plan.fused_head import TOKEN_CHUNK
from train.preflight.plan.step_trace import Segment, trace_step
from train.preflight.plan.traced_model import (
    LayerKinds,
    build_inputs,
    build_model,
    classify_layers,
    fake_tensors,
    find_layers,
    is_flash,
    planned_attention,
    prepare_training,
    traced_kernel,
)
from train.recipe import Recipe
from train.recipe.checkpointing import Checkpointing


class Activations(NamedTuple):
    """Bytes on one GPU.

    - `kept`: from the forward pass until the backward pass has used them;
    - `working`: what the pass through one layer, mostly its backward, needs besides;
    - `head`: output layer and loss, with the casts that autocast keeps until its end.
    """

    kept: int
    working: int
    head: int

    @property
    def peak(self) -> int:
        """Maximum over time: the head's memory is free again when the backward of the first layer begins."""
        return self.kept + max(self.working, self.head)


class _Setting(NamedTuple):
    weights: str
    autocast: bool
    checkpointing: Checkpointing
    adapter: str
    training: bool = True


@contextmanager
def planning(model: str, action: str) -> Iterator[None]:
    """Raise any error in this context as a UserError: whatever an architecture does that a plan doesn't support.

    `model`: name or path; `action`: what fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--gpus: the memory of {model} can't be planned: {action} fails ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Leave out --gpus: the rest of the check works."
        ) from error


_Trace = dict[str, NDArray[np.float64]]
"""By the name of a segment: live bytes at its beginning, and after each allocation in it."""


class ActivationTracer:
    """Activations of a run's micro-batches on one GPU, under the settings that a plan compares. It remembers traces."""

    def __init__(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        self._recipe = recipe
        self._config = config
        self._traces: dict[tuple[_Setting, int, int], _Trace] = {}
        self._layers: LayerKinds | None = None
        self._kernel = ""

    def activations(
        self,
        *,
        weights: str,
        autocast: bool,
        checkpointing: Checkpointing,
        tokens: int,
        longest: int,
        adapter: str = "float32",
    ) -> Activations:
        """Return the bytes of one micro-batch, with all of its tokens trained.

        - `weights`: dtype that the weights have in the forward pass: "float32", or "bfloat16", which stands for float16
          too: a CPU's autocast computes in one of the two and refuses operands of the other;
        - `autocast`: matrix products compute in 16 bits;
        - `checkpointing`: none, selective (TRL's) or full;
        - `tokens`: of the micro-batch, all of its sequences together;
        - `longest`: tokens of the longest sequence in it;
        - `adapter`: dtype of LoRA's matrices: float32 as peft makes them, or bfloat16 as DeepSpeed casts them (and TRL
          those of QLoRA).

        Raises UserError for a model that can't be traced.
        """
        setting = self._setting(weights, autocast, checkpointing, adapter)
        return _extrapolate(self._traced(setting, tokens, longest), self._layers)

    def evaluation(self, *, weights: str, autocast: bool, tokens: int, longest: int, adapter: str = "float32") -> int:
        """Return the most bytes that a batch of an evaluation allocates: forward alone, without gradients."""
        setting = self._setting(weights, autocast, "none", adapter)._replace(training=False)
        working, shift = _forward(trace := self._traced(setting, tokens, longest), self._layers)
        return round(max(*working, trace["head forward"].max() + shift))

    def _traced(self, setting: _Setting, tokens: int, longest: int) -> _Trace:
        with planning(self._recipe.model.name_or_path, "tracing a step of it"):
            self._classify(setting.weights)
            if is_flash(self._kernel):
                return self._interpolated(setting, tokens) or self._trace(setting, tokens, 1)
            # else the rows of a batch are padded to the longest
            return self._trace(setting, tokens, 1 if self._recipe.joins_documents else max(1, tokens // longest))

    def trace_all_layers(
        self, *, weights: str, autocast: bool, checkpointing: Checkpointing, tokens: int, adapter: str = "float32"
    ) -> Activations:
        """Return the same from a trace of all layers with exactly `tokens`, which takes longer."""
        self._classify(weights)
        segments = self._trace_model(self._setting(weights, autocast, checkpointing, adapter), tokens, 1, None)
        return _extrapolate(_by_name(segments), None)

    def _setting(self, weights: str, autocast: bool, checkpointing: Checkpointing, adapter: str) -> _Setting:
        return _Setting(weights, autocast, checkpointing, "bfloat16" if self._recipe.quantization else adapter)

    def _classify(self, weights: str) -> None:
        """Find the kinds of the layers, once: they are the same in each dtype."""
        if not self._kernel:
            self._kernel = traced_kernel(planned_attention(self._recipe, self._config))
            model = build_model(self._recipe, self._config, weights=weights, kernel=self._kernel)
            self._layers = None if _names_layers(self._recipe) else classify_layers(model)

    def _interpolated(self, setting: _Setting, tokens: int) -> _Trace | None:
        """Return the trace for `tokens` from those of two other numbers; None where they differ in their operations.

        FlashAttention keeps no square: beyond a tile of the head, the bytes at each moment are linear in the tokens.
        """
        if tokens <= TOKEN_CHUNK:
            return None
        small, large = 2 * TOKEN_CHUNK, 4 * TOKEN_CHUNK
        if tokens in (small, large):
            return self._trace(setting, tokens, 1)
        low, high = self._trace(setting, small, 1), self._trace(setting, large, 1)
        if low.keys() != high.keys() or any(len(low[name]) != len(high[name]) for name in low):
            return None
        share = (tokens - small) / (large - small)
        return {name: live + share * (high[name] - live) for name, live in low.items()}

    def _trace(self, setting: _Setting, tokens: int, rows: int) -> _Trace:
        key = (setting, tokens, rows)
        if key not in self._traces:
            segments = self._trace_model(setting, tokens, rows, self._layers)
            self._traces[key] = _by_name(segments)
        return self._traces[key]

    def _trace_model(self, setting: _Setting, tokens: int, rows: int, layers: LayerKinds | None) -> list[Segment]:
        model = build_model(
            self._recipe,
            self._config,
            weights=setting.weights,
            kernel=self._kernel,
            traced=layers.traced if layers else (),
        )
        prepared = prepare_training(
            model, self._recipe, checkpointing=setting.checkpointing, adapter=getattr(torch, setting.adapter)
        )
        prepared.train(setting.training)
        with fake_tensors(prepared):
            return trace_step(
                model,
                find_layers(model) or torch.nn.ModuleList(),
                build_inputs(model, self._kernel, tokens, rows),
                autocast=torch.bfloat16 if setting.autocast else None,  # float16 takes as many bytes
            )


def _by_name(segments: list[Segment]) -> _Trace:
    return {segment.name: np.array([segment.start, *segment.live], np.float64) for segment in segments}


def _names_layers(recipe: Recipe) -> bool:
    """Return whether the adapter's modules are those of layers by number: then no layer stands for another."""
    names = (recipe.adapter.target_modules, recipe.adapter.modules_to_save or ()) if recipe.adapter else ()
    return any(
        part.isdecimal() for group in names if not isinstance(group, str) for name in group for part in name.split(".")
    )


def _extrapolate(trace: _Trace, layers: LayerKinds | None) -> Activations:
    """Return the activations of all layers from a trace of some.

    A layer adds the bytes between the starts of its forward pass and the next one's, and its backward pass frees what
    it kept. The two differ under autocast, which frees its casts between them.
    """
    start = {name: float(live[0]) for name, live in trace.items()}
    highest = {name: float(live.max()) for name, live in trace.items()}
    working, forward_shift = _forward(trace, layers)
    working.append(highest.get("end", 0.0))
    backward_shift = 0.0
    if layers is None or len(layers.traced) == len(layers.kinds):
        working += [highest[name] for name in trace if name.startswith("backward")]
    else:
        last, representatives, latest = len(layers.traced) - 1, layers.representatives(), layers.latest()
        if "backward 1" in trace:  # else no gradient reaches the layers
            level = start["backward 1"]
            for layer, place in enumerate(representatives):
                here = f"backward {place}"
                if layer > 1:  # the first layer may keep less: LoRA has no gradient for its input
                    freeing = latest[layers.kinds[layer]]
                    level += start[f"backward {freeing}"] - start[f"backward {freeing - 1}"]
                if layer:
                    working.append(highest[here] - start[here] + level)
            backward_shift = level - start[f"backward {last}"]
            working.append(highest.get("backward 0", 0.0))
    kept = start["head backward"] + backward_shift
    head = max(highest.get("head forward", 0.0) + forward_shift, highest["head backward"] + backward_shift)
    return Activations(round(kept), round(max(0.0, max(working) - kept)), round(max(0.0, head - kept)))


def _forward(trace: _Trace, layers: LayerKinds | None) -> tuple[list[float], float]:
    """Return the highest bytes of the embedding and of each layer's forward pass, and what layers without a trace add
    to the head's."""
    start = {name: float(live[0]) for name, live in trace.items()}
    highest = {name: float(live.max()) for name, live in trace.items()}
    working = [highest["begin"]]
    if layers is None or len(layers.traced) == len(layers.kinds):
        return [*working, *(highest[name] for name in trace if name.startswith("forward"))], 0.0
    last, representatives = len(layers.traced) - 1, layers.representatives()
    level = start["forward 0"]
    for layer, place in enumerate(representatives):
        here = f"forward {place}"
        working.append(highest[here] - start[here] + level)
        if layer < len(representatives) - 1:
            level += start[f"forward {place + 1}"] - start[here]
    return working, level - start[f"forward {last}"]
