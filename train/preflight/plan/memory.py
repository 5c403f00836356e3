"""Bytes of a run on each GPU, part by part, under each way to spread it.

The weights' part follows Rajbhandari et al., "ZeRO" (arXiv:1910.02054, section 3.1: 2 + 2 + 12 bytes a parameter with
bfloat16 and float32 Adam, and section 5: what each stage divides by the number of GPUs), to the byte as DeepSpeed 0.19
lays it out, padding included. Gradients are 4 bytes there, not 2: ds_configs/ add them up in float32.
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
"""Elements after which DeepSpeed closes a bucket to be summed (MEMORY_OPT_ALLREDUCE_SIZE in its engine.py)."""
_NORM_ITEMSIZE = 8
"""DeepSpeed takes a gradient's norm in float64, of a copy (get_norm_dtype in its zero/utils.py)."""
_QUANTIZED_BLOCK, _SCALES_BLOCK = 64, 256
"""bitsandbytes: weights that share a scale, and scales that share one under double quantization."""


class Strategy(NamedTuple):
    """A way to spread a run over GPUs. `stage`: ZeRO's, 0 = a whole copy on each. `offload`: to the host's memory."""

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
"""The least communication first (ZeRO, section 7: stages 1 and 2 send what DDP does, stage 3 half as much again)."""


class Numbers(NamedTuple):
    """What decides the bytes of weights besides the model. `low_precision`: DeepSpeed computes in 16 bits.

    `storage_itemsize`: bytes of an element that packed 4-bit weights are stored in; `double_quant`: their scales are
    quantized too.
    """

    gpus: int
    optimizer: str
    low_precision: bool
    storage_itemsize: int = 2
    double_quant: bool = True


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, the fullest. `gradients`: at their fullest, with several accumulation steps; `step`: what
    reducing them and the optimizer's step hold beyond that; `host`: bytes of one GPU's share that lie in the host's
    memory."""

    parameters: int
    gradients: int
    optimizer: int
    communication: int
    step: int
    host: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, and their greatest sum at any time.

    `activations`: kept through the forward pass; `layer`: one layer's backward; `head`: output layer and loss; `step`:
    the optimizer's step. The last three never meet, nor does the step meet activations.
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


def memory(shape: Architecture, strategy: Strategy, numbers: Numbers, kept: Activations) -> Memory:
    """All parts of a run under `strategy`."""
    states = count_state_bytes(shape, strategy, numbers)
    held = states.parameters + states.gradients + states.optimizer + states.communication
    return Memory(
        strategy=strategy.name,
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        communication=states.communication,
        activations=kept.kept,
        layer=kept.working,
        head=kept.head,
        step=states.step,
        total=held + max(kept.peak, states.step),
        host=states.host,
    )


def count_state_bytes(shape: Architecture, strategy: Strategy, numbers: Numbers) -> States:
    """Parameters, gradients, optimizer and communication buffers of one rank."""
    if strategy.stage == 0:
        return _replicated(shape, numbers)
    if strategy.stage == 3:
        return _partitioned(shape, strategy, numbers)
    if strategy.stage == 1 and numbers.low_precision:
        return _stage_1_in_16_bits(shape, numbers)
    return _stage_1_or_2(shape, strategy, numbers)


def _replicated(shape: Architecture, numbers: Numbers) -> States:
    """Each GPU has all of it, in the dtype that the recipe loads: no master weights are made.

    DDP's buckets are a second copy of the gradients (gradient_as_bucket_view is False in torch and in accelerate).
    """
    trained = [one for one in shape.parameters if one.trained]
    gradients = sum(one.elements * one.itemsize for one in trained)
    tensors = [Tensor(one.shape, one.itemsize, _is_embedding(one, shape)) for one in trained]
    groups = [sum(one.elements * one.itemsize for one in group) for group in _groups(shape.parameters)]
    return States(
        parameters=sum(_stored(one, one.itemsize, numbers) + _scales(one, numbers) for one in shape.parameters),
        gradients=gradients,
        optimizer=state_bytes(numbers.optimizer, tensors),
        communication=gradients if numbers.gpus > 1 else 0,
        step=max((_temporaries(numbers, size) for size in groups), default=0),
    )


def _stage_1_in_16_bits(shape: Architecture, numbers: Numbers) -> States:
    """DeepSpeed's bf16_optimizer.py, which stands in for stage_1_and_2.py where gradients are added up in float32.

    Every GPU has all weights and the sum of all gradients in float32, both padded to 2 elements for each GPU; float32
    masters and states of its share. A layer's gradient is freed as soon as it is added (immediate_grad_update: else
    all of them stay beside their sums, 2 bytes a parameter more). After the last micro-batch the sums are reduced as
    copies in 16 bits; groups that share a bucket are put together before.
    """
    aligned = _aligned(shape, numbers)
    shares = [elements // numbers.gpus for elements in aligned]
    buckets: list[list[int]] = [[]]
    for elements in aligned:
        if sum(buckets[-1]) > _ALL_REDUCE:
            buckets.append([])
        buckets[-1].append(elements)
    reducing = max(sum(bucket) * (2 if len(bucket) == 1 else 4 + 2) for bucket in buckets)
    return States(
        parameters=sum(aligned) * 2 + _frozen(shape, 2, numbers),
        gradients=sum(aligned) * 4,
        optimizer=sum(shares) * 4 + state_bytes(numbers.optimizer, [Tensor((share,), 4) for share in shares]),
        communication=2 * _largest(shape),
        step=max(reducing, *(_temporaries(numbers, 4 * share) for share in shares), 0),
    )


def _stage_1_or_2(shape: Architecture, strategy: Strategy, numbers: Numbers) -> States:
    """DeepSpeed's stage_1_and_2.py: each optimizer group is one flat tensor, padded to 2 elements for each GPU.

    Every GPU has all weights; float32 masters and states of its share. Three buckets of the weights' dtype: one is
    filled, one is reduced, and what is sent is a copy. In 16 bits stage 2 adds its share up in one float32 tensor,
    which the step uses as it is. In float32 it keeps each parameter of which a part is its own, WHOLE; twice, from the
    second accumulation step on; and stage 1 all gradients until the last accumulation step, and such a copy beside
    them in that. The step then makes a flat copy of its share of a group.
    """
    size = 2 if numbers.low_precision else 4
    groups = _groups(shape.parameters)
    aligned = _aligned(shape, numbers)
    shares = [elements // numbers.gpus for elements in aligned]
    parts = _parts(groups, shares, numbers.gpus)
    temporaries = [_temporaries(numbers, 4 * share) for share in shares]
    gradients, step = 4 * sum(shares), max(temporaries, default=0)
    beyond = [max(_NORM_ITEMSIZE * part.largest, step) for part in parts]
    if not numbers.low_precision:
        copies = [4 * part.whole for part in parts]
        gradients = 2 * max(copies)
        if strategy.stage == 1:
            gradients = 4 * sum(one.elements for group in groups for one in group) + max(copies)
        flat = max((4 * share + more for share, more in zip(shares, temporaries, strict=True)), default=0)
        beyond = [
            copy + max(_NORM_ITEMSIZE * part.largest, flat) - gradients
            for copy, part in zip(copies, parts, strict=True)
        ]
    return States(
        parameters=sum(aligned) * size + _frozen(shape, size, numbers),
        gradients=gradients,
        optimizer=sum(shares) * 4 + state_bytes(numbers.optimizer, [Tensor((share,), 4) for share in shares]),
        communication=3 * REDUCE_BUCKET * size + size * _largest(shape),
        step=max(*beyond, 0),
    )


def _partitioned(shape: Architecture, strategy: Strategy, numbers: Numbers) -> States:
    """DeepSpeed's stage3.py and partition_parameters.py: each PARAMETER is padded to a multiple of the GPUs.

    Whole, on every GPU: parameters of up to 10 x hidden size elements (stage3_param_persistence_threshold: auto), 4-bit
    scales, which are no parameters, and for their time those that the next layers need: up to 10^9 elements
    (stage3_max_live_parameters), or the largest if that is more. Gradients are float32, and the step makes a flat copy
    of them of one sub group (10^9 elements) at a time, while no parameter is whole. Float32 weights get master copies
    too: DeepSpeed means to spare them, and compares a torch.device with a string. Offloaded: partitions, masters,
    states and gradients, twice, are in the host's memory.
    """
    size = 2 if numbers.low_precision else 4
    partitions = sum(_partition(one, size, numbers) for one in shape.parameters)
    persistent_share = sum(
        _partition(one, size, numbers)
        for one in shape.parameters
        if _elements_stored(one, numbers) <= 10 * shape.hidden
    )
    persistent = persistent_share * numbers.gpus  # gathered with their padding
    scales = sum(_scales(one, numbers) for one in shape.parameters)
    split = [part for group in _groups(shape.parameters) for part in _split(group, numbers.gpus)]
    sub_groups = [sum(-(-one.elements // numbers.gpus) for one in part) for part in split]
    share = sum(sub_groups)
    optimizer = 4 * share + state_bytes(numbers.optimizer, [Tensor((elements,), 4) for elements in sub_groups])
    stored = [_elements_stored(one, numbers) for one in shape.parameters]
    live = size * min(sum(stored), max(MAX_LIVE, max(stored)))
    gradient = size * _largest(shape)
    bucket = size * shape.hidden**2
    if strategy.offload:
        return States(
            parameters=persistent_share + persistent + scales,
            gradients=0,
            optimizer=0,
            communication=live + bucket + gradient,
            step=0,
            host=partitions - persistent_share + share * (4 + 4) + optimizer,
        )
    steps = [
        (4 * elements if len(part) > 1 else 0) + _temporaries(numbers, 4 * elements)
        for part, elements in zip(split, sub_groups, strict=True)
    ]
    return States(
        parameters=partitions + persistent + scales,
        gradients=share * 4,
        optimizer=optimizer,
        communication=live + bucket + gradient,
        step=max(max([*steps, _NORM_ITEMSIZE * -(-_largest(shape) // numbers.gpus)]) - persistent, 0),
    )


class _Part(NamedTuple):
    """A rank's part of all flat groups, in elements. `whole`: of the parameters that reach into it, all they have;
    `largest`: of one of them, what lies in it."""

    whole: int
    largest: int


def _parts(groups: Sequence[Sequence[Parameter]], shares: Sequence[int], gpus: int) -> list[_Part]:
    """Of each rank; vectorized, as a search over many nodes has thousands of ranks."""
    whole, largest = np.zeros(gpus, np.int64), np.zeros(gpus, np.int64)
    for group, share in zip(groups, shares, strict=True):
        at = 0
        for one in group:
            end = at + one.elements
            ranks = np.arange(at // share, -(-end // share))
            whole[ranks] += one.elements
            inside = np.minimum(end, (ranks + 1) * share) - np.maximum(at, ranks * share)
            largest[ranks] = np.maximum(largest[ranks], inside)
            at = end
    return [_Part(*part) for part in zip(whole.tolist(), largest.tolist(), strict=True)]


def _aligned(shape: Architecture, numbers: Numbers) -> list[int]:
    """Elements of each optimizer group as one flat tensor, padded to 2 elements for each GPU."""
    groups = [sum(one.elements for one in group) for group in _groups(shape.parameters)]
    return [-(-elements // (2 * numbers.gpus)) * 2 * numbers.gpus for elements in groups]


def _frozen(shape: Architecture, itemsize: int, numbers: Numbers) -> int:
    """Bytes of the whole weights that aren't trained."""
    frozen = (one for one in shape.parameters if not one.trained)
    return sum(_stored(one, itemsize, numbers) + _scales(one, numbers) for one in frozen)


def _largest(shape: Architecture) -> int:
    """Elements of the largest trained parameter: its gradient stands alone until it is added or sent."""
    return max((one.elements for one in shape.parameters if one.trained), default=0)


def _temporaries(numbers: Numbers, size: int) -> int:
    """Bytes that the optimizer needs for the step of a group of `size` bytes.

    torch's AdamW makes a second copy of its second moments on a GPU (_multi_tensor_adam in torch/optim/adam.py); where
    it is fused, and in bitsandbytes, one kernel reads and writes in place.
    """
    return size if numbers.optimizer == "adamw_torch" else 0


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """The trained parameters as transformers hands them to the optimizer: decayed, and not; no empty group."""
    trained = [one for one in parameters if one.trained]
    both = ([one for one in trained if one.decayed is decayed] for decayed in (True, False))
    return [group for group in both if group]


def _split(group: Sequence[Parameter], gpus: int) -> list[list[Parameter]]:
    """A group's parameters in sub groups that reach 10^9 elements on a GPU (`_create_fp16_sub_groups`)."""
    parts: list[list[Parameter]] = [[]]
    elements = 0
    for one in group:
        parts[-1].append(one)
        elements += -(-one.elements // gpus)
        if elements >= SUB_GROUP and one is not group[-1]:
            parts.append([])
            elements = 0
    return parts


def _elements_stored(one: Parameter, numbers: Numbers) -> int:
    """Elements of the tensor that holds it: of two 4-bit numbers in a byte, where it is quantized."""
    return -(-one.elements // (2 * numbers.storage_itemsize)) if one.quantized else one.elements


def _stored(one: Parameter, itemsize: int, numbers: Numbers) -> int:
    """Bytes of the whole parameter."""
    return _elements_stored(one, numbers) * (numbers.storage_itemsize if one.quantized else itemsize)


def _partition(one: Parameter, itemsize: int, numbers: Numbers) -> int:
    """Bytes of one GPU's part, padding included (`_padding_size` in partition_parameters.py)."""
    each = -(-_elements_stored(one, numbers) // numbers.gpus)
    return each * (numbers.storage_itemsize if one.quantized else itemsize)


def _scales(one: Parameter, numbers: Numbers) -> int:
    """Bytes of what a 4-bit weight is unpacked with (Dettmers et al., "QLoRA", arXiv:2305.14314, section 3).

    A float32 scale for 64 weights, or with double quantization a byte and a float32 scale for 256 of those.
    """
    if not one.quantized:
        return 0
    scales = -(-one.elements // _QUANTIZED_BLOCK)
    return scales + 4 * -(-scales // _SCALES_BLOCK) if numbers.double_quant else 4 * scales


def _is_embedding(one: Parameter, shape: Architecture) -> bool:
    return one.role == "embedding" or (one.role == "adapter" and one.shape == (shape.vocabulary, shape.hidden))
