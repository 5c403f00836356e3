"""Search for the fastest settings that fit: memory and speed of a run under each of them, on any number of GPUs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from transformers import PreTrainedConfig

from train.loop.master_weights import Launch, master_weights_error
from train.loop.sharding import sharding_error
from train.model.architecture import Architecture, inspect_architecture
from train.model.flops import FLOAT32_FLOPS, Flops
from train.preflight.plan.activations import Activations, ActivationTracer, planning
from train.preflight.plan.cluster import MAX_GPUS, Cluster
from train.preflight.plan.memory import (
    DDP,
    STRATEGIES,
    Memory,
    StateBytes,
    StateSettings,
    Strategy,
    count_state_bytes,
    sum_memory,
)
from train.preflight.plan.settings import (
    Settings,
    computes_in_16_bits,
    has_16_bit_weights,
    list_overrides,
    list_settings,
    optimizer_name,
    uses_tf32,
    written_settings,
)
from train.preflight.plan.speed import StepSeconds, estimate_step
from train.preflight.plan.traced_model import planned_attention
from train.recipe import Recipe
from train.recipe.sft_config import with_defaults

EIGHT_BIT_ADAM = "adamw_bnb_8bit"
MAX_NODES = 64
"""Nodes up to which a fit is searched for."""
EQUALLY_FAST = 1.02
"""Ratio of seconds that the model of speed does not tell apart: other reasons then decide."""
ROOMY = 0.8
"""Share of the usable memory up to which more room is no reason to communicate more."""
_NO_MASTERS = "16-bit weights without float32 copies lose small updates (model.dtype=float32)"
_ITEMSIZES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Workload:
    """Optimizer steps of a run, and the model's FLOPs in one of them, all GPUs together.

    `reference_hours`: before the first step, to compute the reference's log-probabilities (DPO).
    """

    steps: int
    flops: Flops
    reference_hours: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Memory and speed of a run under one choice of settings.

    - `overrides`: what turns the recipe into these settings;
    - `usable_memory`: bytes of a GPU without RESERVE;
    - `refusal`: the reason why a run with these settings doesn't start;
    - `fits`: it starts, and takes no more than the usable memory;
    - `seconds`, `hours`: of an optimizer step and of the run, by the model of speed.
    """

    settings: Settings
    overrides: list[str]
    memory: Memory
    usable_memory: float
    refusal: str | None
    fits: bool
    seconds: StepSeconds
    hours: float


@dataclass(frozen=True)
class FewestGpus:
    """The fewest GPUs on which the run fits without offload, with `optimizer` as `training.optim`.

    `gpus`: of one node; None where it needs several. `nodes`: complete ones; None where it fits on no number up to
    MAX_NODES. `strategy`: the one that communicates least.
    """

    optimizer: str
    gpus: int | None
    nodes: int | None
    strategy: str | None


class _Dtypes(TypedDict):
    weights: str
    autocast: bool
    adapter: str


class Candidates:
    """All candidates of a recipe. It remembers what several of them share.

    - `length`: tokens of the longest sequence;
    - `attention`: the kernel that training would take;
    - `tracer`: of another recipe with the same model, adapter and packing, whose traces are used again.
    """

    def __init__(
        self, recipe: Recipe, config: PreTrainedConfig, length: int, tracer: ActivationTracer | None = None
    ) -> None:
        """Inspect the model's architecture. Raises UserError for one that can't be planned."""
        self.recipe, self.length = recipe, length
        with planning(recipe.model.name_or_path, "building it without weights"):
            self.shape = inspect_architecture(recipe, config)
            self.attention = planned_attention(recipe, config)
        self._half = computes_in_16_bits(recipe)
        self.tracer = tracer or ActivationTracer(recipe, config)
        self._states: dict[tuple[Strategy, str, str, int], StateBytes] = {}
        quantization = recipe.quantization
        self._storage = _ITEMSIZES[quantization.bnb_4bit_quant_storage] if quantization else 2
        self._double_quant = quantization.bnb_4bit_use_double_quant if quantization else True

    def list(self, strategy: Strategy, optimizer: str | None = None) -> list[Settings]:
        """Return all settings under `strategy` that a run accepts, or all where it refuses each of them.

        `optimizer`: in place of the recipe's.
        """
        loses_updates = self._loses_updates(self.recipe.model.dtype)
        every = [*list_settings(self.recipe, strategy, self.attention, optimizer, loses_updates=loses_updates)]
        return [settings for settings in every if self.refusal(settings) is None] or every

    def refusal(self, settings: Settings) -> str | None:
        """Return the reason why a run with `settings` doesn't start; None if it does."""
        stage = settings.strategy.stage
        if stage == 0:
            return _NO_MASTERS if self._loses_updates(settings.dtype) else None
        launch = Launch({"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}})
        return sharding_error(self.recipe, launch, settings.checkpointing)

    def evaluate(self, settings: Settings, cluster: Cluster, workload: Workload) -> Candidate:
        """Return the candidate of `settings` on `cluster`."""
        memory, seconds = self.memory(settings, cluster), self.seconds(settings, cluster, workload)
        refusal = self.refusal(settings)
        return Candidate(
            settings=settings,
            overrides=list_overrides(self.recipe, settings),
            memory=memory,
            usable_memory=cluster.usable_memory,
            refusal=refusal,
            fits=refusal is None and memory.total <= cluster.usable_memory,
            seconds=seconds,
            hours=workload.reference_hours + seconds.total * workload.steps / 3_600,
        )

    def memory(self, settings: Settings, cluster: Cluster) -> Memory:
        """Return the bytes of one GPU under `settings` on `cluster`."""
        return sum_memory(settings.strategy, self._count_states(settings, cluster), self._activations(settings))

    def with_peak(self, cluster: Cluster) -> Cluster:
        """Return `cluster` with the peak of its GPUs in the type that the run computes in."""
        if self._half:
            return cluster
        peak, tf32 = FLOAT32_FLOPS[cluster.gpu]
        return replace(cluster, peak_flops=tf32 if uses_tf32(self.recipe) else peak)

    def seconds(self, settings: Settings, cluster: Cluster, workload: Workload) -> StepSeconds:
        """Return the seconds of an optimizer step."""
        return estimate_step(
            self._shape_in(settings.dtype),
            workload.flops,
            settings,
            self._count_states(settings, cluster),
            self.with_peak(cluster),
            low_precision=self._half,
            weight_bytes=self._bytes_computed_with,
        )

    def fits(self, strategy: Strategy, cluster: Cluster, optimizer: str) -> bool:
        """Return whether any settings under `strategy` fit on `cluster`."""
        leanest = self.leanest(self.list(strategy, optimizer))
        return self.refusal(leanest) is None and self.memory(leanest, cluster).total <= cluster.usable_memory

    @staticmethod
    def leanest(settings: Sequence[Settings]) -> Settings:
        """Return the settings that take the least memory: full checkpointing, one sequence at a time."""
        order = ("full", "selective", "none")
        return min(settings, key=lambda each: (order.index(each.checkpointing), each.batch))

    @property
    def _bytes_computed_with(self) -> int:
        """Bytes of all weights in the type that they are computed with; quantized ones stay in 4 bits."""
        itemsize = 2 if self._half else 4
        return sum(
            parameter.elements // 2 if parameter.quantized else parameter.elements * itemsize
            for parameter in self.shape.parameters
        )

    def _loses_updates(self, dtype: str) -> bool:
        """Return whether a run without DeepSpeed is refused for its 16-bit weights."""
        loaded = "bfloat16" if has_16_bit_weights(self._shape_in(dtype)) else "float32"
        return master_weights_error(self.recipe, loaded, Launch()) is not None

    def _shape_in(self, dtype: str) -> Architecture:
        """Return the architecture with weights loaded as `dtype`."""
        if dtype == self.recipe.model.dtype:
            return self.shape
        itemsize = _ITEMSIZES[dtype]
        return replace(
            self.shape,
            parameters=tuple(replace(parameter, itemsize=itemsize) for parameter in self.shape.parameters),
        )

    def _count_states(self, settings: Settings, cluster: Cluster) -> StateBytes:
        key = (settings.strategy, settings.dtype, settings.optimizer, cluster.processes)
        if key not in self._states:
            state_settings = StateSettings(
                cluster.processes,
                settings.optimizer,
                self._half,
                self._storage,
                self._double_quant,
                float16=bool(self.recipe.training.get("fp16")),
            )
            self._states[key] = count_state_bytes(self._shape_in(settings.dtype), settings.strategy, state_settings)
        return self._states[key]

    def check_traceable(self) -> None:
        """Raise UserError for a model whose activations can't be traced."""
        for strategy in (DDP, STRATEGIES[-1]):
            self._activations(self.leanest(self.list(strategy)))

    def evaluation_batch(self, settings: Settings, cluster: Cluster) -> int | None:
        """Return the `per_device_eval_batch_size` to write so that evaluation fits; None where the recipe's does."""
        training = with_defaults(self.recipe.training)
        if training["eval_strategy"] in (None, "no"):
            return None
        states = self._count_states(settings, cluster)
        held = states.parameters + states.gradients + states.optimizer + states.communication
        written = batch = training["per_device_eval_batch_size"]
        length = self._own_length
        while batch > 1:
            needed = self.tracer.evaluation(**self._dtypes(settings), tokens=batch * length, longest=length)
            if held + needed <= cluster.usable_memory:
                break
            batch //= 2
        return batch if batch != written else None

    @property
    def _own_length(self) -> int:
        """Tokens of the longest sequence on each of the GPUs that share it."""
        return -(-self.length // self.recipe.model.sequence_parallel)

    def _activations(self, settings: Settings) -> Activations:
        length = self._own_length
        return self.tracer.activations(
            **self._dtypes(settings),
            checkpointing=settings.checkpointing,
            tokens=settings.batch * length,
            longest=length,
        )

    def _dtypes(self, settings: Settings) -> _Dtypes:
        """Return the types to trace: DeepSpeed casts all weights to 16 bits; without it autocast does in their use."""
        sharded = settings.strategy.stage > 0
        loaded = "bfloat16" if has_16_bit_weights(self._shape_in(settings.dtype)) else "float32"
        return {
            "weights": ("bfloat16" if self._half else "float32") if sharded else loaded,
            "autocast": self._half and not sharded,
            "adapter": "bfloat16" if sharded and self._half else "float32",
        }


def list_strategies(cluster: Cluster) -> list[Strategy]:
    """Return the strategies to choose from: one GPU has nobody to share states with."""
    return [strategy for strategy in STRATEGIES if cluster.processes > 1 or strategy is DDP or strategy.offload]


def list_optimizers(optimizer: str) -> list[str]:
    """Return the recipe's optimizer, and 8-bit Adam if it takes less."""
    return [optimizer] if "8bit" in optimizer or "adafactor" in optimizer else [optimizer, EIGHT_BIT_ADAM]


def find_best(
    candidates: Candidates, cluster: Cluster, workload: Workload, optimizer: str | None = None
) -> list[Candidate]:
    """Return the best candidate of each strategy on `cluster`, or the smallest where none fits."""
    every = [_list_fitting(candidates, cluster, workload, strategy, optimizer) for strategy in list_strategies(cluster)]
    fastest = fastest_seconds([candidate for of_strategy in every for candidate in of_strategy])
    return [_best(of_strategy, fastest) or of_strategy[0] for of_strategy in every]


def _list_fitting(
    candidates: Candidates, cluster: Cluster, workload: Workload, strategy: Strategy, optimizer: str | None
) -> list[Candidate]:
    """Return the candidates of a strategy that fit and are within EQUALLY_FAST of its fastest, or else the leanest.

    Speed costs nothing to compute, and memory a trace, so settings are tried from the fastest on.
    """
    every = candidates.list(strategy, optimizer)
    leanest = candidates.evaluate(candidates.leanest(every), cluster, workload)
    fitting: list[Candidate] = []
    if not leanest.fits:
        return [leanest]
    for settings in sorted(every, key=lambda settings: candidates.seconds(settings, cluster, workload).total):
        if fitting and candidates.seconds(settings, cluster, workload).total > EQUALLY_FAST * fitting[0].seconds.total:
            break
        if (candidate := candidates.evaluate(settings, cluster, workload)).fits:
            fitting.append(candidate)
    return fitting


def choose(best: Sequence[Candidate]) -> Candidate | None:
    """Return the best candidate; None where none fits."""
    return _best(best, fastest_seconds(best))


def fastest_seconds(candidates: Sequence[Candidate]) -> float:
    """Return the seconds of the fastest that fits; with offload only where nothing else fits.

    Offload needs hundreds of GiB of the host's memory and a C++ compiler, and its speed is the least certain.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    on_gpu = [candidate for candidate in fitting if not candidate.settings.strategy.offload]
    return min((candidate.seconds.total for candidate in on_gpu or fitting), default=math.inf)


def _best(candidates: Sequence[Candidate], fastest: float) -> Candidate | None:
    """Return the best of those that fit: within EQUALLY_FAST of `fastest`, or of their own fastest if that is slower.

    Of several: the fewest overrides; then, with room to spare, the least communication; then the smallest.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    own = fastest_seconds(fitting)
    limit = EQUALLY_FAST * (fastest if own <= EQUALLY_FAST * fastest else own)
    close = [candidate for candidate in fitting if candidate.seconds.total <= limit]

    def order(candidate: Candidate) -> tuple[float, ...]:
        roomy = candidate.memory.total <= ROOMY * candidate.usable_memory
        strategy = candidate.settings.strategy
        return strategy.offload, len(candidate.overrides), not roomy, STRATEGIES.index(strategy), candidate.memory.total

    return min(close, key=order, default=None)


def evaluate_written(candidates: Candidates, cluster: Cluster, workload: Workload) -> list[Candidate]:
    """Return the recipe as written under each strategy."""
    written = (written_settings(candidates.recipe, strategy) for strategy in list_strategies(cluster))
    return [candidates.evaluate(settings, cluster, workload) for settings in written]


def find_fewest(candidates: Candidates, cluster: Cluster, optimizer: str | None = None) -> FewestGpus:
    """Search for the fewest GPUs of one node, then the fewest nodes, that a run fits without offload."""
    optimizer = optimizer or optimizer_name(candidates.recipe)

    def strategy_on(tried: Cluster) -> str | None:
        if tried.processes % candidates.recipe.model.sequence_parallel:
            return None
        return next(
            (
                strategy.name
                for strategy in list_strategies(tried)
                if not strategy.offload and candidates.fits(strategy, tried, optimizer)
            ),
            None,
        )

    for gpus in range(1, cluster.gpus + 1):
        if strategy := strategy_on(replace(cluster, gpus=gpus, nodes=1)):
            return FewestGpus(optimizer, gpus, 1, strategy)
    for nodes in range(2, min(MAX_NODES, MAX_GPUS // cluster.gpus) + 1):
        if strategy := strategy_on(replace(cluster, nodes=nodes)):
            return FewestGpus(optimizer, None, nodes, strategy)
    return FewestGpus(optimizer, None, None, None)
