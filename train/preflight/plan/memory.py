"""Bytes of a run on each GPU, by part, under each way to distribute it.

Parameters, gradients and optimizer states follow Rajbhandari et al., "ZeRO" (arXiv:1910.02054, section 3.1: 2 + 2 + 12
bytes a parameter with bfloat16 and float32 Adam, and section 5: what each stage divides by the number of GPUs), to the
byte as DeepSpeed 0.19 lays them out, padding included. Gradients take 4 bytes, not 2: ds_configs/ accumulate them in
float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from train.model.architecture import Architecture, Parameter
from train.preflight.plan.activations import Activations
from train.preflight.plan.optimizer_states import Tensor, state_bytes

MAX_LIVE, SUB_GROUP = 1_000_000_000, 1_000_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters and sub_group_size, in elements."""
REDUCE_BUCKET = 200_000_000
"""reduce_bucket_size in ds_configs/zero1.json and zero2.json, in elements."""
_ALL_REDUCE = 500_000_000
"""Elements after which DeepSpeed closes a bucket to be reduced (MEMORY_OPT_ALLREDUCE_SIZE in its engine.py)."""
_NORM_ITEMSIZE = 8
"""Bytes of an element of the float64 copy that a gradient's norm is taken of (get_norm_dtype in zero/utils.py)."""
_QUANTIZED_BLOCK, _SCALES_BLOCK = 64, 256
"""bitsandbytes: weights that share a scale, and scales that share one under double quantization."""


@dataclass(frozen=True)
class Strategy:
    """A way to distribute a run over GPUs. `stage`: of ZeRO, 0 = a copy on each; `offload`: to the host's memory."""

    name: str
    stage: int
    offload: bool
    config_file: str


DDP = Strategy("DDP", 0, False, "accelerate_configs/ddp.yaml")
STRATEGIES = (
    DDP,
    Strategy("ZeRO-1", 1, False, "accelerate_configs/zero1.yaml"),
    Strategy("ZeRO-2", 2, False, "accelerate_configs/zero2.yaml"),
    Strategy("ZeRO-3", 3, False, "accelerate_configs/zero3.yaml"),
    Strategy("ZeRO-3 offload", 3, True, "accelerate_configs/zero3_offload.yaml"),
)
"""Ordered by communication (ZeRO, section 7: stages 1 and 2 send as much as DDP, stage 3 1.5 times as much)."""


class StateSettings(NamedTuple):
    """Settings besides the model that decide the bytes of parameters, gradients and optimizer states.

    - `optimizer`: as in `training.optim`;
    - `low_precision`: DeepSpeed computes in 16 bits; `float16`: in float16;
    - `storage_itemsize`: bytes of an element that packed 4-bit weights are stored in;
    - `double_quant`: the scales of 4-bit weights are quantized too.
    """

    gpus: int
    optimizer: str
    low_precision: bool
    storage_itemsize: int = 2
    double_quant: bool = True
    float16: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Bytes on the GPU that holds most.

    - `gradients`: their maximum, with several accumulation steps;
    - `step`: what reducing them and the optimizer's step need beyond that;
    - `host`: one GPU's share of the host's memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    step: int
    host: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, and `total`, the maximum of their sum over time.

    - `activations`: kept from the forward pass for the backward pass;
    - `layer`, `head`, `step`: peaks at different times (one layer's backward; output layer and loss; the optimizer's
      step): `total` takes their maximum. In the step there are no activations.
    """

    strategy: str
    parameters: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    layer: int
    head: int
    step: int
    total: int
    host: int


def sum_memory(strategy: Strategy, states: StateBytes, activations: Activations) -> Memory:
    """Return all parts of a run under `strategy`, and their total."""
    permanent = states.parameters + states.gradients + states.optimizer + states.communication
    return Memory(
        strategy=strategy.name,
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        communication=states.communication,
        activations=activations.kept,
        layer=activations.working,
        head=activations.head,
        step=states.step,
        total=permanent + max(activations.peak, states.step),
        host=states.host,
    )


def count_state_bytes(shape: Architecture, strategy: Strategy, settings: StateSettings) -> StateBytes:
    """Return the bytes of parameters, gradients, optimizer states and communication buffers of one rank."""
    if strategy.stage == 0:
        return _replicated(shape, settings)
    if strategy.stage == 3:
        return _partitioned(shape, strategy, settings)
    if strategy.stage == 1 and settings.low_precision and not settings.float16:
        return _stage_1_in_16_bits(shape, settings)
    return _stage_1_or_2(shape, strategy, settings)


def _replicated(shape: Architecture, settings: StateSettings) -> StateBytes:
    """Return the bytes under DDP: every GPU holds all states, in the dtype of the recipe, without master weights.

    DDP's buckets are a second copy of the gradients (gradient_as_bucket_view is False in torch and in accelerate).
    """
    trained = [parameter for parameter in shape.parameters if parameter.trained]
    gradients = sum(parameter.elements * parameter.itemsize for parameter in trained)
    tensors = [Tensor(parameter.shape, parameter.itemsize, _is_embedding(parameter, shape)) for parameter in trained]
    groups = [
        sum(parameter.elements * parameter.itemsize for parameter in group) for group in _groups(shape.parameters)
    ]
    return StateBytes(
        parameters=sum(
            _stored(parameter, parameter.itemsize, settings) + _scales(parameter, settings)
            for parameter in shape.parameters
        ),
        gradients=gradients,
        optimizer=state_bytes(settings.optimizer, tensors),
        communication=gradients if settings.gpus > 1 else 0,
        step=max((_temporaries(settings, size) for size in groups), default=0),
    )


def _stage_1_in_16_bits(shape: Architecture, settings: StateSettings) -> StateBytes:
    """Return the bytes in DeepSpeed's bf16_optimizer.py, its stage 1 for bfloat16 with float32 accumulation.

    - Every GPU holds all weights and the sum of all gradients in float32, both padded to 2 elements per GPU, and the
      float32 master weights and states of its share.
    - A layer's gradient is freed once it is added (immediate_grad_update; without it, all of them stay beside their
      sums: 2 bytes more per parameter).
    - After the last micro-batch the sums are reduced in place (communication_data_type: fp32); groups that share a
      bucket are copied together before.
    """
    aligned = _aligned(shape, settings)
    shares = [elements // settings.gpus for elements in aligned]
    buckets: list[list[int]] = [[]]
    for elements in aligned:
        if sum(buckets[-1]) > _ALL_REDUCE:
            buckets.append([])
        buckets[-1].append(elements)
    reducing = max(sum(bucket) * (0 if len(bucket) == 1 else 4) for bucket in buckets)
    return StateBytes(
        parameters=sum(aligned) * 2 + _frozen(shape, 2, settings),
        gradients=sum(aligned) * 4,
        optimizer=sum(shares) * 4 + state_bytes(settings.optimizer, [Tensor((share,), 4) for share in shares]),
        communication=2 * _largest(shape),
        step=max(reducing, *(_temporaries(settings, 4 * share) for share in shares), 0),
    )


def _stage_1_or_2(shape: Architecture, strategy: Strategy, settings: StateSettings) -> StateBytes:
    """Return the bytes in DeepSpeed's stage_1_and_2.py: a flat tensor per group, padded to 2 elements per GPU.

    - Every GPU holds all weights, and the float32 master weights and states of its share.
    - There are three buckets in the weights' dtype: one is filled, one is reduced, and a copy is sent.
    - In 16 bits stage 2 accumulates its share in one float32 tensor, which the step uses directly.
    - Stage 1 in float16 accumulates all gradients in float32, sends them so, and copies its share beside them (from the
      source: use_grad_accum_attribute; no test has counted it).
    - In float32 stage 2 keeps the gradient of each parameter that its share overlaps, complete, and twice from the
      second accumulation step on. Stage 1 keeps all gradients until the last accumulation step, and such a copy beside
      them in it. The step then makes a flat copy of its share of a group.
    """
    size = 2 if settings.low_precision else 4
    groups = _groups(shape.parameters)
    aligned = _aligned(shape, settings)
    shares = [elements // settings.gpus for elements in aligned]
    parts = _parts(groups, shares, settings.gpus)
    temporaries = [_temporaries(settings, 4 * share) for share in shares]
    gradients, step = 4 * sum(shares), max(temporaries, default=0)
    sent = size
    if strategy.stage == 1 and settings.float16:
        gradients += 4 * sum(parameter.elements for group in groups for parameter in group)
        sent = 4
    beyond = [max(_NORM_ITEMSIZE * part.largest, step) for part in parts]
    if not settings.low_precision:
        copies = [4 * part.complete for part in parts]
        gradients = 2 * max(copies)
        if strategy.stage == 1:
            gradients = 4 * sum(parameter.elements for group in groups for parameter in group) + max(copies)
        flat = max((4 * share + more for share, more in zip(shares, temporaries, strict=True)), default=0)
        beyond = [
            copy + max(_NORM_ITEMSIZE * part.largest, flat) - gradients
            for copy, part in zip(copies, parts, strict=True)
        ]
    return StateBytes(
        parameters=sum(aligned) * size + _frozen(shape, size, settings),
        gradients=gradients,
        optimizer=sum(shares) * 4 + state_bytes(settings.optimizer, [Tensor((share,), 4) for share in shares]),
        communication=3 * REDUCE_BUCKET * sent + size * _largest(shape),
        step=max(*beyond, 0),
    )


def _partitioned(shape: Architecture, strategy: Strategy, settings: StateSettings) -> StateBytes:
    """Return the bytes in DeepSpeed's stage3.py and partition_parameters.py: each parameter is padded to equal shares.

    - Complete on every GPU: parameters of up to 10 x hidden size elements (stage3_param_persistence_threshold: auto),
      4-bit scales, which are no parameters, and temporarily those that the next layers need: up to 10^9 elements
      (stage3_max_live_parameters), or the largest parameter if that is more.
    - Gradients are float32. The step makes a flat copy of them for one sub group (10^9 elements) at a time, while no
      parameter is gathered.
    - Float32 weights have master copies too: DeepSpeed means to save them, but compares a torch.device with a string.
    - With offload the partitions, master weights, states and twice the gradients are in the host's memory.
    """
    size = 2 if settings.low_precision else 4
    partitions = sum(_partition(parameter, size, settings) for parameter in shape.parameters)
    persistent_share = sum(
        _partition(parameter, size, settings)
        for parameter in shape.parameters
        if _elements_stored(parameter, settings) <= 10 * shape.hidden
    )
    persistent = persistent_share * settings.gpus  # gathered with their padding
    scales = sum(_scales(parameter, settings) for parameter in shape.parameters)
    split = [part for group in _groups(shape.parameters) for part in _split(group, settings.gpus)]
    sub_groups = [sum(-(-parameter.elements // settings.gpus) for parameter in part) for part in split]
    share = sum(sub_groups)
    optimizer = 4 * share + state_bytes(settings.optimizer, [Tensor((elements,), 4) for elements in sub_groups])
    stored = [_elements_stored(parameter, settings) for parameter in shape.parameters]
    live = size * min(sum(stored), max(MAX_LIVE, max(stored)))
    gradient = size * _largest(shape)
    bucket = size * shape.hidden**2
    if strategy.offload:
        return StateBytes(
            parameters=persistent_share + persistent + scales,
            gradients=0,
            optimizer=0,
            communication=live + bucket + gradient,
            step=0,
            host=partitions - persistent_share + share * (4 + 4) + optimizer,
        )
    steps = [
        (4 * elements if len(part) > 1 else 0) + _temporaries(settings, 4 * elements)
        for part, elements in zip(split, sub_groups, strict=True)
    ]
    return StateBytes(
        parameters=partitions + persistent + scales,
        gradients=share * 4,
        optimizer=optimizer,
        communication=live + bucket + gradient,
        step=max(max([*steps, _NORM_ITEMSIZE * -(-_largest(shape) // settings.gpus)]) - persistent, 0),
    )


class _Part(NamedTuple):
    """A rank's share of all flat groups, in elements.

    `complete`: of all parameters that overlap it, in full; `largest`: the largest overlap with one of them.
    """

    complete: int
    largest: int


def _parts(groups: Sequence[Sequence[Parameter]], shares: Sequence[int], gpus: int) -> list[_Part]:
    """Return the share of each rank; vectorized, as a search over many nodes has thousands of ranks."""
    complete, largest = np.zeros(gpus, np.int64), np.zeros(gpus, np.int64)
    for group, share in zip(groups, shares, strict=True):
        at = 0
        for parameter in group:
            end = at + parameter.elements
            ranks = np.arange(at // share, -(-end // share))
            complete[ranks] += parameter.elements
            inside = np.minimum(end, (ranks + 1) * share) - np.maximum(at, ranks * share)
            largest[ranks] = np.maximum(largest[ranks], inside)
            at = end
    return [_Part(*part) for part in zip(complete.tolist(), largest.tolist(), strict=True)]


def _aligned(shape: Architecture, settings: StateSettings) -> list[int]:
    """Return the elements of each optimizer group as one flat tensor, padded to 2 elements per GPU."""
    groups = [sum(parameter.elements for parameter in group) for group in _groups(shape.parameters)]
    return [-(-elements // (2 * settings.gpus)) * 2 * settings.gpus for elements in groups]


def _frozen(shape: Architecture, itemsize: int, settings: StateSettings) -> int:
    """Return the bytes of the weights that aren't trained."""
    frozen = (parameter for parameter in shape.parameters if not parameter.trained)
    return sum(_stored(parameter, itemsize, settings) + _scales(parameter, settings) for parameter in frozen)


def _largest(shape: Architecture) -> int:
    """Return the elements of the largest trained parameter: its gradient is separate until it is added or sent."""
    return max((parameter.elements for parameter in shape.parameters if parameter.trained), default=0)


def _temporaries(settings: StateSettings, size: int) -> int:
    """Return the bytes that the optimizer's step needs for a group of `size` bytes.

    torch's AdamW makes a copy of its second moments on a GPU (_multi_tensor_adam in torch/optim/adam.py). Fused AdamW
    and bitsandbytes update in place.
    """
    return size if settings.optimizer == "adamw_torch" else 0


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Return the trained parameters by optimizer group of transformers: with decay and without; none is empty."""
    trained = [parameter for parameter in parameters if parameter.trained]
    both = ([parameter for parameter in trained if parameter.decayed is decayed] for decayed in (True, False))
    return [group for group in both if group]


def _split(group: Sequence[Parameter], gpus: int) -> list[list[Parameter]]:
    """Split a group into sub groups that reach 10^9 elements on a GPU (`_create_fp16_sub_groups`)."""
    parts: list[list[Parameter]] = [[]]
    elements = 0
    for parameter in group:
        parts[-1].append(parameter)
        elements += -(-parameter.elements // gpus)
        if elements >= SUB_GROUP and parameter is not group[-1]:
            parts.append([])
            elements = 0
    return parts


def _elements_stored(parameter: Parameter, settings: StateSettings) -> int:
    """Return the elements of the stored tensor: a byte holds two 4-bit settings of a quantized parameter."""
    return -(-parameter.elements // (2 * settings.storage_itemsize)) if parameter.quantized else parameter.elements


def _stored(parameter: Parameter, itemsize: int, settings: StateSettings) -> int:
    """Return the bytes of the complete parameter."""
    return _elements_stored(parameter, settings) * (settings.storage_itemsize if parameter.quantized else itemsize)


def _partition(parameter: Parameter, itemsize: int, settings: StateSettings) -> int:
    """Return the bytes of one GPU's partition, padding included (`_padding_size` in partition_parameters.py)."""
    each = -(-_elements_stored(parameter, settings) // settings.gpus)
    return each * (settings.storage_itemsize if parameter.quantized else itemsize)


def _scales(parameter: Parameter, settings: StateSettings) -> int:
    """Return the bytes of a 4-bit weight's scales (Dettmers et al., "QLoRA", arXiv:2305.14314, section 3).

    There is a float32 scale per 64 weights; with double quantization a byte, and a float32 scale per 256 of those.
    """
    if not parameter.quantized:
        return 0
    scales = -(-parameter.elements // _QUANTIZED_BLOCK)
    return scales + 4 * -(-scales // _SCALES_BLOCK) if settings.double_quant else 4 * scales


def _is_embedding(parameter: Parameter, shape: Architecture) -> bool:
    return parameter.role == "embedding" or (
        parameter.role == "adapter" and parameter.shape == (shape.vocabulary, shape.hidden)
    )
