"""How much memory and how long a run takes, before a GPU is asked for: `train/sft.py --check --gpus 8x80GB --nodes 2`.

From the recipe, the model's config and the lengths of the rows; no weights are loaded.
"""

import re
import shlex
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.model.architecture import Architecture
from train.model.flops import CONVENTION, DEFAULT_GPU, DEFAULT_MFU, MEMORY_GIB, PEAK_FLOPS, count_training_flops, hours
from train.preflight.plan.activations import Precision, activations
from train.preflight.plan.memory import DDP, STRATEGIES, Memory, Numbers, Strategy, memory
from train.preflight.plan.optimizer_states import KNOWN, is_paged, runs_on_host
from train.recipe import Recipe
from train.recipe.sft_config import with_defaults

RESERVE = 0.08
"""Share of a GPU left to the CUDA context, NCCL, kernels' workspaces and gaps between blocks: an estimate of ours."""
_DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' with torch 2.8 or newer
EIGHT_BIT_ADAM = "adamw_bnb_8bit"
MOST_NODES = 64
"""On how many nodes at most a place is looked for."""
_GIB = 2**30
_MOST_GPUS = 16_384
"""More than any run has had (Llama 3 405B: arXiv:2407.21783, section 3.3)."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `gpus` GPUs each, of `memory` bytes. `peak_flops`: FLOP/s of dense bfloat16.

    `assumed`: the name was not given, and the peak is that of `gpu`. `mfu`: share of the peak that a run gets.
    """

    gpus: int
    nodes: int
    gpu: str
    memory: int
    peak_flops: float
    assumed: bool
    mfu: float

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Candidate:
    """One way to run. `fits`: with RESERVE of each GPU left. `caution`: why a way that fits is not the one to take."""

    memory: Memory
    fits: bool
    caution: str | None


@dataclass(frozen=True)
class FewestNodes:
    """With this `training.optim`, the fewest nodes on which the run fits without offload, and under which strategy.

    Null where it fits on no number of nodes up to MOST_NODES. `here`: the strategy under which it fits the cluster as
    it is; null where it doesn't.
    """

    optimizer: str
    nodes: int | None
    strategy: str | None
    here: str | None


@dataclass(frozen=True)
class Plan:
    """Memory in bytes on one GPU (`host`: a GPU's share of its node's), FLOPs of the whole run, hours at that `mfu`.

    `chosen`, `config_file` and `launch`: the first candidate that fits and has no caution, or else that fits; or null.
    `fewest_nodes`: with the recipe's optimizer, and with 8-bit Adam.
    """

    cluster: Cluster
    parameters: int
    trained_parameters: int
    method: str
    optimizer: str
    tokens_per_gpu: int
    checkpointing: bool
    candidates: list[Candidate]
    chosen: str | None
    config_file: str | None
    launch: str | None
    fewest_nodes: list[FewestNodes]
    steps: int
    sequences_per_step: int
    tokens: int
    parameter_flops: float
    attention_flops: float
    flops: float
    hours: float
    gpu_hours: float
    convention: str
    notes: list[str]


def parse_cluster(gpus: str, nodes: int | None = None, mfu: float | None = None) -> Cluster:
    """`8x80GB`, `8xH100`, `8xA100-80GB`: GPUs of one node. A GB is 2^30 bytes, as GPUs are sold.

    Without them there is one node, and the share of the peak is DEFAULT_MFU.
    Raises UserError for what can't be read, and for a GPU that comes in several sizes or is not known and has none.
    """
    nodes, mfu = 1 if nodes is None else nodes, DEFAULT_MFU if mfu is None else mfu
    found = re.fullmatch(
        r"(\d+)\s*x\s*(?:([A-Za-z][A-Za-z0-9]*?)(?:-|(?=\d+GB$)|$))?(?:(\d+)\s*GB)?", gpus.strip(), re.IGNORECASE
    )
    if not found or not (found[2] or found[3]) or int(found[1]) < 1:
        raise UserError(f"--gpus: found {gpus!r}. Write how many a node has and which, such as 8x80GB or 8xH100-80GB.")
    name = (found[2] or "").upper()
    if name and name not in PEAK_FLOPS:
        raise UserError(f"--gpus: {found[2]} is not known. Known: {', '.join(PEAK_FLOPS)}; or write the size alone.")
    size = int(found[3] or MEMORY_GIB.get(name, 0))
    if size < 1:
        raise UserError(f"--gpus: {name} comes in several sizes. Write which, such as {found[1]}x{name}-80GB.")
    if not 1 <= nodes * int(found[1]) <= _MOST_GPUS:
        raise UserError(f"--gpus, --nodes: found {nodes} times {found[1]}. Write 1 to {_MOST_GPUS:,} GPUs in all.")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: found {mfu}. Write a share of the GPU's peak, such as {DEFAULT_MFU}.")
    gpu = name or DEFAULT_GPU
    return Cluster(int(found[1]), nodes, gpu, size * _GIB, PEAK_FLOPS[gpu], not name, mfu)


def plan(
    recipe: Recipe,
    shape: Architecture,
    cluster: Cluster,
    documents: NDArray[np.integer],
    *,
    steps: int,
    epochs: float,
    sequences_per_step: int,
) -> Plan:
    """What fits, and how long it takes. `documents`: tokens of each trained row of an epoch; the rest: the schedule."""
    settings = with_defaults(recipe.training)
    optimizer = optimizer_name(recipe)
    length = recipe.data.max_length if recipe.data.packing else int(documents.max(initial=0))
    ways = list_strategies(cluster)
    candidates = [candidate(recipe, shape, cluster, one, optimizer, length) for one in ways]
    fitting = [(one.caution is not None, order) for order, one in enumerate(candidates) if one.fits]
    chosen = ways[min(fitting)[1]] if fitting else None
    once = count_training_flops(shape, documents)
    total = once.total * epochs
    took = hours(total, cluster.processes, cluster.peak_flops, cluster.mfu)
    return Plan(
        cluster=cluster,
        parameters=shape.total,
        trained_parameters=shape.trained,
        method="full" if recipe.adapter is None else "QLoRA" if recipe.quantization else "LoRA",
        optimizer=optimizer,
        tokens_per_gpu=settings["per_device_train_batch_size"] * length,
        checkpointing=_checkpointing(settings),
        candidates=candidates,
        chosen=chosen.name if chosen else None,
        config_file=_config_file(chosen, cluster) if chosen else None,
        launch=_launch(recipe, chosen, cluster, optimizer) if chosen else None,
        fewest_nodes=[fewest_nodes(recipe, shape, cluster, one, length) for one in list_optimizers(optimizer)],
        steps=steps,
        sequences_per_step=sequences_per_step,
        tokens=round(float(documents.sum()) * epochs),
        parameter_flops=once.parameters * epochs,
        attention_flops=once.attention * epochs,
        flops=total,
        hours=took,
        gpu_hours=took * cluster.processes,
        convention=CONVENTION,
        notes=list(_notes(recipe, settings, optimizer, selective=_selective(settings), chosen=chosen)),
    )


def optimizer_name(recipe: Recipe) -> str:
    """The recipe's `training.optim`, or transformers' default."""
    return str(recipe.training.get("optim") or _DEFAULT_OPTIMIZER)


def _checkpointing(settings: dict[str, Any]) -> bool:
    chosen = settings.get("activation_checkpointing")
    return bool(settings["gradient_checkpointing"] if chosen is None else chosen)


def _selective(settings: dict[str, Any]) -> bool:
    return bool((settings.get("gradient_checkpointing_kwargs") or {}).get("selective"))


def list_strategies(cluster: Cluster) -> list[Strategy]:
    """Return the strategies to choose from: one GPU has nothing to share."""
    return [one for one in STRATEGIES if cluster.processes > 1 or one is DDP or one.offload]


def candidate(
    recipe: Recipe, shape: Architecture, cluster: Cluster, strategy: Strategy, optimizer: str, length: int
) -> Candidate:
    """The memory of a run under `strategy` with sequences of `length` tokens, and whether a GPU has that."""
    settings = with_defaults(recipe.training)
    half = bool(settings["fp16"]) or settings.get("bf16") is not False
    used = optimizer if not strategy.offload or runs_on_host(optimizer) else "adamw_torch"
    numbers = Numbers(
        cluster.processes,
        used,
        half,
        _itemsize(recipe.quantization.bnb_4bit_quant_storage) if recipe.quantization else 2,
        recipe.quantization.bnb_4bit_use_double_quant if recipe.quantization else True,
    )
    body = next(one.itemsize for one in shape.parameters if one.role != "adapter")
    weights = body if strategy.stage == 0 else 2 if half else 4
    kept = activations(
        shape,
        settings["per_device_train_batch_size"] * length,
        Precision(weights, min(weights, 2) if half else weights),
        checkpointing=_checkpointing(settings) and not _selective(settings),
        adapter_dropout=bool(recipe.adapter and recipe.adapter.lora_dropout),
        squared_length=length if recipe.model.attention == "eager" else 0,
    )
    found = memory(shape, strategy, numbers, kept)
    loses = strategy.stage == 0 and recipe.adapter is None and weights == 2
    return Candidate(
        found,
        found.total <= usable(cluster),
        "but 16-bit weights without float32 copies lose small updates" if loses else None,
    )


def usable(cluster: Cluster) -> float:
    """Bytes of a GPU that a run may take: RESERVE of it is left free."""
    return cluster.memory * (1 - RESERVE)


def list_optimizers(optimizer: str) -> list[str]:
    """The recipe's own, and 8-bit Adam where that isn't it."""
    return [optimizer] if "8bit" in optimizer or "adafactor" in optimizer else [optimizer, EIGHT_BIT_ADAM]


def fewest_nodes(recipe: Recipe, shape: Architecture, cluster: Cluster, optimizer: str, length: int) -> FewestNodes:
    """The fewest nodes of such GPUs on which a way fits that neither offloads nor has a caution."""

    def fitting(nodes: int) -> str | None:
        some = replace(cluster, nodes=nodes)
        for way in list_strategies(some):
            if not way.offload:
                found = candidate(recipe, shape, some, way, optimizer, length)
                if found.fits and not found.caution:
                    return way.name
        return None

    here = fitting(cluster.nodes)
    for nodes in range(1, min(MOST_NODES, _MOST_GPUS // cluster.gpus) + 1):
        if strategy := fitting(nodes):
            return FewestNodes(optimizer, nodes, strategy, here)
    return FewestNodes(optimizer, None, None, here)


def _itemsize(dtype: str) -> int:
    return {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}[dtype]


def _config_file(strategy: Strategy, cluster: Cluster) -> str:
    return strategy.config_file if cluster.processes > 1 or strategy.stage else "accelerate_configs/single_gpu.yaml"


def _launch(recipe: Recipe, strategy: Strategy, cluster: Cluster, optimizer: str) -> str:
    words = ["accelerate launch --config_file", _config_file(strategy, cluster)]
    if cluster.processes > 1:
        words.append(f"--num_processes {cluster.processes}")
    if cluster.nodes > 1:
        words.append(f"--num_machines {cluster.nodes} --machine_rank RANK --main_process_ip HOST")
        words.append("--main_process_port 29500")
    if cluster.nodes > 1 and strategy.stage:
        words.append("--deepspeed_multinode_launcher standard")
    words += ["train/sft.py --recipe", *map(shlex.quote, [recipe._origin.file, *recipe._origin.overrides])]
    if strategy.offload and not runs_on_host(optimizer):
        words.append("training.optim=adamw_torch")
    return " ".join(words)


def _notes(
    recipe: Recipe, settings: dict[str, Any], optimizer: str, *, selective: bool, chosen: Strategy | None
) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if optimizer not in KNOWN:
        notes.append(f"training.optim: {optimizer} is counted as AdamW with float32 states: its own are not known here")
    if chosen and chosen.offload:
        notes.append("offload waits for the host's memory and CPU: it takes far longer than the hours shown")
    if is_paged(optimizer):
        notes.append(f"training.optim: {optimizer} may move its states to the host's memory; counted as if it didn't")
    if not runs_on_host(optimizer):
        notes.append(f"offload runs AdamW in float32 on the CPU, in place of {optimizer}")
    if (chosen is None or chosen.offload) and "8bit" not in optimizer and recipe.adapter is None:
        notes.append("training.optim=adamw_bnb_8bit takes 6 bytes a parameter less than AdamW, spread over the GPUs")
    notes += [
        f"training.{key} in the recipe decides how the run is split, whatever it is launched with: take it out, and "
        "the launch configuration does"
        for key in ("deepspeed", "fsdp")
        if settings.get(key)
    ]
    if selective:
        notes.append("selective checkpointing is counted as none: between the two, at most that much")
    if settings.get("activation_offloading"):
        notes.append("training.activation_offloading moves activations to the host's memory; counted as if it didn't")
    if settings["label_smoothing_factor"] or settings.get("loss_type") not in (None, "nll"):
        notes.append("this loss may need all logits at once: the head takes more than is shown")
    return notes


def describe(found: Plan) -> list[str]:
    """The plan as lines of plain text."""
    cluster = found.cluster
    where = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus}"
    known = "taken for H100" if cluster.assumed else cluster.gpu
    lines = [
        f"{where} GPU{'s' if cluster.gpus > 1 else ''} of {cluster.memory / _GIB:.0f} GB ({known}); {found.method}, "
        f"{found.trained_parameters:,} of {found.parameters:,} parameters, {found.optimizer}",
        f"GiB on each GPU, {found.tokens_per_gpu:,} tokens at a time, "
        f"gradient checkpointing {'on' if found.checkpointing else 'off'}:",
        *_table([one.memory for one in found.candidates], [one.fits for one in found.candidates]),
    ]
    for one in found.candidates:
        if one.fits and one.caution:
            lines.append(f"{one.memory.strategy} fits, {one.caution}")
        if one.memory.host:
            lines.append(f"{one.memory.strategy} takes {one.memory.host * cluster.gpus / _GIB:,.0f} GiB of each host")
    lines.append(
        f"total: the first five and the largest of layer and head, or the first four and step; {RESERVE:.0%} of a GPU "
        "is left free"
    )
    if found.chosen:
        lines += [
            f"recommended, as it fits with the least communication: {found.chosen}",
            *_command(found.launch or ""),
        ]
    else:
        lines.append(
            "none fits: take a smaller training.per_device_train_batch_size or data.max_length, an adapter or more GPUs"
        )
    lines += _describe_fewest(found)
    attention = found.attention_flops / max(found.flops, 1)
    lines += [
        f"{found.steps:,} steps of {found.sequences_per_step:,} sequences, {found.tokens:,} tokens, {found.flops:.3g} "
        f"FLOPs, {attention:.1%} of them attention",
        f"{_duration(found.hours)} ({found.gpu_hours:,.1f} GPU-hours) at {cluster.mfu:.0%} of {cluster.gpu}'s "
        f"{cluster.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16",
    ]
    return [*lines, f"counted: {found.convention}", *found.notes]


def _describe_fewest(found: Plan) -> list[str]:
    """The fewest nodes, and what 8-bit Adam makes of them where the recipe's optimizer needs more than one."""
    own, *others = found.fewest_nodes
    plural = "s" if found.cluster.gpus > 1 else ""

    def where(one: FewestNodes) -> str:
        return f"--nodes {one.nodes} ({one.strategy})" if one.nodes else f"none up to {MOST_NODES}"

    lines = [f"fewest nodes of {found.cluster.gpus} such GPU{plural} that it fits without offload: {where(own)}"]
    for other in others if own.nodes != 1 else ():
        here = "these nodes" if found.cluster.nodes > 1 else "this node"
        fits = f"fits {here} ({other.here})" if other.here else f"does not fit {here} either"
        if own.here:
            fits = "is not needed here"
        lines.append(f"8-bit Adam (training.optim={other.optimizer}) {fits}; its fewest nodes: {where(other)}")
    return lines


def _table(memories: list[Memory], fits: list[bool]) -> list[str]:
    """Return GiB by what they are for, a column for each strategy; in 48 columns, which a narrow terminal has."""
    names = [memory.strategy.replace("ZeRO-3 offload", "offload") for memory in memories]
    rows: list[tuple[str, list[str]]] = [("", names)]
    for label, part in _PARTS.items():
        rows.append((label, [f"{getattr(memory, part) / _GIB:,.1f}" for memory in memories]))
    rows.append(("fits", ["yes" if one else "no" for one in fits]))
    return [f"{label:<8}" + "".join(f"{cell:>8}" for cell in cells) for label, cells in rows]


def _command(launch: str) -> list[str]:
    """Return a command in lines that a shell takes as one."""
    lines = wrap(launch, _COMMAND_WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"  {'  ' if number else ''}{line}" for number, line in enumerate(" \\\n".join(lines).split("\n"))]


_COMMAND_WIDTH = 42
_PARTS = {
    "weights": "parameters",
    "grads": "gradients",
    "optim.": "optimizer",
    "comm.": "communication",
    "activ.": "activations",
    "layer": "layer",
    "head": "head",
    "step": "step",
    "total": "total",
}


def _duration(time: float) -> str:
    return f"{time:,.1f} hours" if time >= 1 else f"{time * 60:,.1f} minutes"
