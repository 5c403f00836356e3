"""Model of speed: seconds of an optimizer step under given settings, to rank them. Not measured on a GPU.

A step's seconds are the sum of

- compute: FLOPs of the model and of recomputation, at the share of the peak that `--mfu` implies;
- communication: bytes of each strategy over NVLink or the network, where computing does not hide them;
- traffic: bytes that casts, gradient sums and the optimizer move in the GPU's memory;
- host: what offload moves through PCIe and computes on the CPU.

Loading data, evaluation, saving, the dequantization of 4-bit weights and the loss of efficiency in micro-batches below
some 8,192 tokens are not counted.
"""

from dataclasses import dataclass
from typing import NamedTuple

from train.model.architecture import Architecture
from train.model.flops import Flops, multiplied
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.memory import StateBytes
from train.preflight.plan.settings import Settings
from train.recipe.checkpointing import Checkpointing


class Hardware(NamedTuple):
    """GB/s of one GPU by its vendor's data sheet, links in one direction: its memory, GPU to GPU in a node, PCIe.

    `network`: GB/s per GPU between nodes, as these GPUs are usually sold: 400 Gbit/s for each Hopper or Blackwell
    (DGX H100, DGX B200), 200 for each A100 (DGX A100), 100 for GPUs without NVLink: an assumption.
    """

    memory: float
    link: float
    network: float
    pcie: float


HARDWARE = {
    "GB200": Hardware(8_000, 900, 50, 64),  # NVLink 5: 1.8 TB/s in both directions
    "B200": Hardware(8_000, 900, 50, 64),
    "H200": Hardware(4_800, 450, 50, 64),  # NVLink 4: 900 GB/s
    "H100": Hardware(3_350, 450, 50, 64),
    "H20": Hardware(4_000, 450, 50, 64),
    "A100": Hardware(2_039, 300, 25, 32),  # the 80 GB board; NVLink 3: 600 GB/s
    "A6000": Hardware(768, 32, 12.5, 32),
    "A10": Hardware(600, 32, 12.5, 32),
    "L40S": Hardware(864, 32, 12.5, 32),
    "L4": Hardware(300, 32, 12.5, 32),
    "MI300X": Hardware(5_300, 448, 50, 64),  # seven Infinity Fabric links of 64 GB/s
}
REACHED = 0.8
"""Share of a link's or a memory's data sheet bandwidth that long transfers reach: an assumption."""
NOT_HIDDEN = 0.1
"""Share of the seconds of overlapped communication that a step is longer by, as both share the GPU: an assumption."""
CPU_ADAM_SECONDS = 0.25e-9
"""Seconds of DeepSpeed's CPU Adam per parameter and node: 0.22 s for 10^9, 2.57 s for 10^10
(ZeRO-Offload, arXiv:2101.06840, table 4)."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of an optimizer step by part, and their sum."""

    compute: float
    communication: float
    traffic: float
    host: float
    total: float


def recomputed_flops(shape: Architecture, flops: Flops, checkpointing: Checkpointing) -> float:
    """Return the FLOPs computed again in the backward pass: the layers' forward pass, not the output layer's.

    `flops`: of the model, in CONVENTION. A weight takes 2 FLOPs a token forward, of 6 if trained and 4 if frozen;
    attention a third. Selective checkpointing keeps attention's output and computes the rest again.
    """
    if checkpointing == "none":
        return 0.0
    counted = multiplied(shape)
    per_token = sum((6 if parameter.trained else 4) * parameter.elements for parameter in counted)
    forward = 2 * sum(
        parameter.elements for parameter in counted if parameter.shape != (shape.vocabulary, shape.hidden)
    )
    attention = flops.attention / 3 if checkpointing == "full" else 0.0
    return flops.parameters * forward / per_token + attention


def bus_bandwidth(cluster: Cluster) -> float:
    """Return the bytes/s at which each GPU sends and receives in a collective over all GPUs.

    Across nodes NCCL's rings enter and leave a node through all of its network cards, so each GPU has the bandwidth of
    the node's cards together, at most its own links' (nccl-tests, doc/PERFORMANCE.md: bus bandwidth).
    """
    hardware = HARDWARE[cluster.gpu]
    link = hardware.link if cluster.nodes == 1 else min(hardware.link, hardware.network * cluster.gpus)
    return REACHED * link * 1e9


def estimate_step(
    shape: Architecture,
    flops: Flops,
    settings: Settings,
    states: StateBytes,
    cluster: Cluster,
    *,
    low_precision: bool,
    weight_bytes: int,
) -> StepSeconds:
    """Return the seconds of one optimizer step.

    - `flops`: of the model in a step, all GPUs together;
    - `states`: of one GPU under these settings;
    - `low_precision`: matrix products have 16-bit operands;
    - `weight_bytes`: of all weights as they are computed with.

    `--mfu` is the MFU of this model with full checkpointing, before communication: so is the default, which other
    checkpointing exceeds (llm-foundry's 7B on 8 x H100: 37 % at 8,192 and 40 % at 4,096 tokens with checkpointing, 46 %
    at 2,048 without).
    """
    full = 1 + recomputed_flops(shape, flops, "full") / max(flops.total, 1.0)
    utilisation = min(cluster.mfu * full, 1.0)
    executed = flops.total + recomputed_flops(shape, flops, settings.checkpointing)
    compute = executed / (cluster.processes * cluster.peak_flops * utilisation)
    communication = _communication(shape, settings, cluster, compute, low_precision, weight_bytes)
    traffic = _traffic(shape, settings, states, cluster, low_precision)
    host = _host(shape, settings, cluster, compute, weight_bytes) if settings.strategy.offload else 0.0
    return StepSeconds(compute, communication, traffic, host, compute + communication + traffic + host)


def _communication(
    shape: Architecture,
    settings: Settings,
    cluster: Cluster,
    compute: float,
    low_precision: bool,
    weight_bytes: int,
) -> float:
    """Return the seconds that communication adds (ZeRO, arXiv:1910.02054, section 7; bytes of one GPU).

    P = bytes of the trained weights' gradients as they are sent, W of all weights.

    - DDP: an all-reduce, 2P, once a step beside the last backward pass, in the weights' dtype.
    - ZeRO-1 in 16 bits: an all-reduce of float32 sums, 4P, after the last backward pass (DeepSpeed's
      bf16_optimizer.py with communication_data_type: fp32); P to gather the new weights.
    - ZeRO-2: P reduced in each micro-batch beside its backward pass; P to gather the new weights. ZeRO-1 in float32
      reduces in the last micro-batch.
    - ZeRO-3: W gathered forward and again backward, and P reduced, in each micro-batch.
    """
    if cluster.processes == 1:
        return 0.0
    stage, trained = settings.strategy.stage, shape.trained
    size = 2 if low_precision else 4
    each = last = after = 0.0  # beside each micro-batch, beside the last one, after it
    if stage == 0:
        last = 2 * sum(parameter.elements * parameter.itemsize for parameter in shape.parameters if parameter.trained)
    elif stage == 1 and low_precision:
        after = trained * (2 * 4 + size)
    elif stage == 1:
        last, after = trained * size, trained * size
    elif stage == 2:
        each, after = trained * size, trained * size
    else:
        each = 2 * weight_bytes + trained * size
    seconds = (cluster.processes - 1) / cluster.processes / bus_bandwidth(cluster)
    window = compute / settings.accumulation
    return settings.accumulation * _exposed(each * seconds, window) + _exposed(last * seconds, window) + after * seconds


def _exposed(seconds: float, window: float) -> float:
    """Return the seconds by which communication beside `window` seconds of computing lengthens a step."""
    return max(NOT_HIDDEN * seconds, seconds - window)


def _traffic(
    shape: Architecture, settings: Settings, states: StateBytes, cluster: Cluster, low_precision: bool
) -> float:
    """Return the seconds that casts, sums of gradients and the optimizer's step take in the GPU's memory.

    Bytes per element:

    - float32 weights under autocast: 4 + 2 for a cast in each forward pass, computed again or not, and for the
      gradient's back;
    - a sum of gradients: the gradient is read, and the sum read and written in float32, on the GPUs that hold it;
    - the optimizer's step: its states (and master weights) are read and written, gradients are read, new weights
      written.
    """
    stage, trained = settings.strategy.stage, shape.trained
    shards = cluster.processes if stage >= 2 else 1
    each = 0.0
    if settings.accumulation > 1:
        each += (10 if stage and low_precision else 12) * trained / shards
    if stage == 0 and low_precision:
        wide = sum(
            parameter.elements
            for parameter in shape.parameters
            if parameter.itemsize == 4 and not parameter.quantized and len(parameter.shape) > 1
        )
        each += 6 * wide * (1 if settings.checkpointing == "none" else 2) + 6 * trained
    step = 2.0 * states.optimizer + states.gradients + (2 * states.gradients if stage == 0 else 0)
    return (settings.accumulation * each + step) / (REACHED * HARDWARE[cluster.gpu].memory * 1e9)


def _host(shape: Architecture, settings: Settings, cluster: Cluster, compute: float, weight_bytes: int) -> float:
    """Return the seconds that offload adds: a GPU's share of weights and gradients over PCIe, Adam on the CPU."""
    share = (2 * weight_bytes + 4 * shape.trained) / cluster.processes
    transfer = share / (REACHED * HARDWARE[cluster.gpu].pcie * 1e9)
    window = compute / settings.accumulation
    adam = CPU_ADAM_SECONDS * shape.trained / cluster.nodes
    return settings.accumulation * _exposed(transfer, window) + adam
