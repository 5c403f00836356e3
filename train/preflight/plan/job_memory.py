"""Memory of a Slurm job on the GPUs that it requests: a warning, and what would fit, before it waits in a queue."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UserError
from train.model.flops import PEAK_FLOPS, count_training_flops
from train.model.load import trained_config
from train.preflight.plan.candidates import (
    Candidate,
    Candidates,
    Workload,
    choose,
    find_best,
    find_fewest,
    list_optimizers,
)
from train.preflight.plan.cluster import GIB, RESERVE, Cluster, parse_cluster
from train.preflight.plan.memory import DDP, STRATEGIES, Strategy
from train.preflight.plan.plan import config_file
from train.preflight.plan.settings import optimizer_name, written_settings
from train.recipe import Recipe
from train.recipe.schedule import sequences_per_step

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


def open_candidates(recipe: Recipe) -> Candidates:
    """Return the candidates of a recipe. Raises UserError for a model that can't be planned.

    The data isn't read: rows are assumed to be data.max_length long, as both halves of a pair.
    """
    return Candidates(recipe, trained_config(recipe), recipe.sequence_length)


def can_be_planned(recipe: Recipe) -> bool:
    """Return whether a step under DDP and under DeepSpeed can be traced."""
    try:
        open_candidates(recipe).check_traceable()
    except UserError:
        return False
    return True


def read_strategy(config: Mapping[str, Any], recipe: Recipe) -> Strategy | None:
    """Return the strategy of an accelerate configuration; None for one that can't be planned (FSDP, ZeRO++'s hpZ)."""
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
        if zero.get("zero_hpz_partition_size", 1) > 1:  # each node has a second copy of the 16-bit weights
            return None
        stage, offload = zero.get("stage", 0), "offload_optimizer" in zero or "offload_param" in zero
    else:
        stage = int(deepspeed.get("zero_stage", 0))
        offload = any(deepspeed.get(f"offload_{part}_device", "none") != "none" for part in ("optimizer", "param"))
    return next((strategy for strategy in STRATEGIES if (strategy.stage, strategy.offload) == (stage, offload)), None)


def memory_warning(candidates: Candidates, cluster: Cluster, strategy: Strategy, launched: str) -> str | None:
    """Return a paragraph on what doesn't fit and what would; None if the job fits as launched, evaluation included."""
    recipe = candidates.recipe
    written = written_settings(recipe, strategy)
    memory = candidates.memory(written, cluster)
    if memory.total <= cluster.usable_memory:
        if (evaluated := candidates.evaluation_batch(written, cluster)) is None:
            return None
        return (
            "the plan says that this job trains and runs out of memory in its first evaluation. Write "
            f"training.per_device_eval_batch_size={evaluated}."
        )
    ways = list(dict.fromkeys(_list_ways(candidates, cluster, strategy)))
    remedy = f"What fits: {'; or '.join(ways)}." if ways else "Write a smaller data.max_length, or train an adapter."
    if any(way.startswith("--nodes") for way in ways):
        remedy += " More nodes train more sequences a step: lower training.gradient_accumulation_steps as much."
    needed, usable, total = (size / GIB for size in (memory.total, cluster.usable_memory, cluster.memory))
    return (
        f"the plan says that this job does not fit: {strategy.name} ({launched}) needs {needed:,.1f} GiB on each of "
        f"{cluster.processes:,} GPUs, and {usable:,.1f} of their {total:,.0f} GiB can be used ({RESERVE:.0%} is left "
        f"free). {remedy}"
    )


def _list_ways(candidates: Candidates, cluster: Cluster, strategy: Strategy) -> Iterator[str]:
    """Yield options and overrides under which the job fits.

    Without offload: the fastest on these nodes, and with this configuration; else on the fewest nodes, and with 8-bit
    Adam. Then with offload.
    """
    recipe = candidates.recipe
    sequences = sequences_per_step(recipe, cluster.processes)
    documents = np.full(sequences * recipe.documents_per_row, recipe.data.max_length)
    workload = Workload(1, count_training_flops(candidates.shape, documents))

    def way(candidate: Candidate, nodes: int) -> str:
        words = [f"--nodes {nodes}"] if nodes != cluster.nodes else []
        other = candidate.settings.strategy
        if other != strategy:
            several = nodes != 1 and other.stage == 3 and not other.offload
            words.append(f"--config {_SEVERAL_NODES if several else config_file(other, cluster)}")
        return " ".join([*words, *candidate.overrides])

    best = find_best(candidates, cluster, workload)
    launched = next((each for each in best if each.settings.strategy == strategy), None)
    here = [each for each in (choose(best), launched) if each and each.fits]
    on_gpus = [each for each in here if not each.settings.strategy.offload]
    yield from (way(each, cluster.nodes) for each in on_gpus)
    for optimizer in list_optimizers(optimizer_name(recipe)) if not on_gpus else ():
        fewest = find_fewest(candidates, cluster, optimizer)
        if fewest.nodes is not None and fewest.nodes >= cluster.nodes:
            on_nodes = replace(cluster, nodes=fewest.nodes)
            if candidate := choose(find_best(candidates, on_nodes, workload, optimizer)):
                yield way(candidate, fewest.nodes)
    yield from (way(each, cluster.nodes) for each in here if each not in on_gpus)
