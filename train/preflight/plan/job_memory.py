"""Memory of a job on the GPUs that it asks a cluster for: a warning, and what would fit, before it waits in a queue."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.model.architecture import Architecture, inspect_architecture
from train.model.flops import PEAK_FLOPS
from train.model.load import load_config
from train.preflight.plan.memory import DDP, STRATEGIES, Strategy
from train.preflight.plan.optimizer_states import runs_on_host
from train.preflight.plan.plan import (
    RESERVE,
    Cluster,
    candidate,
    fewest_nodes,
    list_optimizers,
    list_strategies,
    optimizer_name,
    parse_cluster,
    usable,
)
from train.recipe import Recipe

_GIB = 2**30
_SEVERAL_NODES = "accelerate_configs/zero3_multinode.yaml"


def parse_gpu_names(names: Sequence[str], count: int) -> str | None:
    """`8xH100-80GB`, as `--gpus` has it, from what a cluster calls its GPUs; None where that doesn't tell their memory.

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
    """Return the model's shape; None for a mixture of experts, which the plan doesn't know."""
    try:
        return inspect_architecture(recipe, load_config(recipe.model))
    except UserError:
        return None


def read_strategy(config: Mapping[str, Any], recipe: Recipe) -> Strategy | None:
    """Return how one of accelerate's configurations spreads the run; None where that isn't known here (FSDP)."""
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
        offload = any(deepspeed.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param"))
    return next((one for one in STRATEGIES if (one.stage, one.offload) == (stage, offload)), None)


def memory_warning(
    recipe: Recipe, shape: Architecture, cluster: Cluster, strategy: Strategy, config_file: str
) -> str | None:
    """Return what doesn't fit and what would, as one paragraph; None where the job fits.

    Rows are taken to be as long as data.max_length: the data isn't read.
    """
    optimizer, length = optimizer_name(recipe), recipe.data.max_length
    found = candidate(recipe, shape, cluster, strategy, optimizer, length)
    if found.fits:
        return None
    ways: list[str] = []

    def add(nodes: int | None, other: Strategy, other_optimizer: str) -> None:
        words = [f"--nodes {nodes}"] if nodes != cluster.nodes else []
        if other is not strategy:
            several = nodes != 1 and other.stage == 3 and not other.offload
            words.append(f"--config {_SEVERAL_NODES if several else other.config_file}")
        if other_optimizer != optimizer:
            words.append(f"training.optim={other_optimizer}")
        ways.append(" ".join(words))

    for one in list_strategies(cluster):
        fitting = candidate(recipe, shape, cluster, one, optimizer, length)
        if fitting.fits and not fitting.caution:
            add(cluster.nodes, one, "adamw_torch" if one.offload and not runs_on_host(optimizer) else optimizer)
            break
    by_name = {one.name: one for one in STRATEGIES}
    for tried in list_optimizers(optimizer):
        fewest = fewest_nodes(recipe, shape, cluster, tried, length)
        if fewest.here and tried != optimizer:
            add(cluster.nodes, by_name[fewest.here], tried)
        elif not fewest.here and fewest.strategy:
            add(fewest.nodes, by_name[fewest.strategy], tried)
    smaller = "a smaller training.per_device_train_batch_size or data.max_length"
    needed, free, whole = (size / _GIB for size in (found.memory.total, usable(cluster), cluster.memory))
    what = f"What fits: {'; or '.join(ways)}. Or write {smaller}." if ways else f"Write {smaller}, or train an adapter."
    return (
        f"the plan says that this job does not fit: {strategy.name} ({config_file}) needs {needed:,.1f} GiB on each of "
        f"{cluster.processes:,} GPUs, and {free:,.1f} of their {whole:,.0f} GiB can be used ({RESERVE:.0%} is left "
        f"free). {what}"
    )
