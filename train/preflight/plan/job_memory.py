"""Memory of a Slurm job on the GPUs that it requests: a warning, and what would fit, before it waits in a queue."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.model.architecture import Architecture, inspect_architecture
from train.model.flops import PEAK_FLOPS
from train.model.load import load_config
from train.preflight.plan.candidates import (
    evaluate_candidate,
    find_fewest_nodes,
    list_optimizers,
    list_strategies,
    optimizer_name,
)
from train.preflight.plan.cluster import GIB, RESERVE, Cluster, parse_cluster
from train.preflight.plan.memory import DDP, STRATEGIES, Strategy
from train.preflight.plan.optimizer_states import runs_on_host
from train.recipe import Recipe

_SEVERAL_NODES = "accelerate_configs/zero3_multinode.yaml"


def parse_gpu_names(names: Sequence[str], count: int) -> str | None:
    """Parse a cluster's names of its GPUs into the form of `--gpus`: `8xH100-80GB`; None if the memory isn't certain.

    `names`: a type (`h100`, `nvidia_a100-sxm4-80gb`, a slice `1g.10gb`) or a constraint (`a100&80gb`).
    """
    words = [word for name in names for word in re.split(r"[^A-Z0-9]+", name.upper())]
    model = next((word for word in words if word in PEAK_FLOPS), "")
    size = next((word for word in words if re.fullmatch(r"\d+GB", word)), "")
    if count < 1 or not (model or size) or ("NVL" in words and not size):  # an H100 NVL has 94 GB
        return None
    gpus = f"{count}x{'-'.join(filter(None, (model, size)))}"
    try:
        parse_cluster(gpus)
    except UserError:  # an A100 has 40 or 80 GB
        return None
    return gpus


def dense_architecture(recipe: Recipe) -> Architecture | None:
    """Return the model's architecture; None for a mixture of experts, which can't be planned."""
    try:
        return inspect_architecture(recipe, load_config(recipe.model))
    except UserError:
        return None


def read_strategy(config: Mapping[str, Any], recipe: Recipe) -> Strategy | None:
    """Return the strategy of an accelerate configuration; None for one that can't be planned (FSDP)."""
    if recipe.training.get("deepspeed") or recipe.training.get("fsdp"):  # they decide, whatever it is launched with
        return None
    kind = str(config.get("distributed_type", "NO"))
    if kind in ("NO", "MULTI_GPU"):
        return DDP
    deepspeed = config.get("deepspeed_config") or {}
    if kind != "DEEPSPEED":
        return None
    if file := deepspeed.get("deepspeed_config_file"):
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        stage, offload = zero.get("stage", 0), "offload_optimizer" in zero or "offload_param" in zero
    else:
        stage = int(deepspeed.get("zero_stage", 0))
        offload = any(deepspeed.get(f"offload_{part}_device", "none") != "none" for part in ("optimizer", "param"))
    return next((strategy for strategy in STRATEGIES if (strategy.stage, strategy.offload) == (stage, offload)), None)


def memory_warning(
    recipe: Recipe, shape: Architecture, cluster: Cluster, strategy: Strategy, config_file: str
) -> str | None:
    """Return a paragraph on what doesn't fit and what would; None if the job fits.

    The data isn't read: rows are assumed to be data.max_length long.
    """
    optimizer, length = optimizer_name(recipe), recipe.data.max_length
    memory = evaluate_candidate(recipe, shape, cluster, strategy, optimizer, length).memory
    if memory.total <= cluster.usable_memory:
        return None
    options: list[str] = []

    def add_option(nodes: int | None, other: Strategy, other_optimizer: str) -> None:
        words = [f"--nodes {nodes}"] if nodes != cluster.nodes else []
        if other is not strategy:
            several = nodes != 1 and other.stage == 3 and not other.offload
            words.append(f"--config {_SEVERAL_NODES if several else other.config_file}")
        if other_optimizer != optimizer:
            words.append(f"training.optim={other_optimizer}")
        options.append(" ".join(words))

    for other in list_strategies(cluster):
        candidate = evaluate_candidate(recipe, shape, cluster, other, optimizer, length)
        if candidate.fits and not candidate.caution:
            on_cpu = other.offload and not runs_on_host(optimizer)
            add_option(cluster.nodes, other, "adamw_torch" if on_cpu else optimizer)
            break
    by_name = {other.name: other for other in STRATEGIES}
    for other_optimizer in list_optimizers(optimizer):
        fewest = find_fewest_nodes(recipe, shape, cluster, other_optimizer, length)
        if fewest.here and other_optimizer != optimizer:
            add_option(cluster.nodes, by_name[fewest.here], other_optimizer)
        elif not fewest.here and fewest.strategy:
            add_option(fewest.nodes, by_name[fewest.strategy], other_optimizer)
    smaller = "a smaller training.per_device_train_batch_size or data.max_length"
    remedy = f"What fits: {'; or '.join(options)}. Or write {smaller}."
    if not options:
        remedy = f"Write {smaller}, or train an adapter."
    needed, usable, total = (size / GIB for size in (memory.total, cluster.usable_memory, cluster.memory))
    return (
        f"the plan says that this job does not fit: {strategy.name} ({config_file}) needs {needed:,.1f} GiB on each of "
        f"{cluster.processes:,} GPUs, and {usable:,.1f} of their {total:,.0f} GiB can be used ({RESERVE:.0%} is left "
        f"free). {remedy}"
    )
