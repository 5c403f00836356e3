"""Memory and duration of a run before a GPU is requested: `train/sft.py --check --gpus 8x80GB --nodes 2`.

They follow from the recipe, the model's config and the lengths of the rows; no weights are loaded.
"""

import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.model.architecture import Architecture
from train.model.flops import CONVENTION, count_training_flops, estimate_hours
from train.preflight.plan.candidates import (
    Candidate,
    FewestNodes,
    evaluate_candidate,
    find_fewest_nodes,
    is_selective,
    list_optimizers,
    list_strategies,
    optimizer_name,
    uses_checkpointing,
)
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.memory import Strategy
from train.preflight.plan.optimizer_states import KNOWN, is_paged, runs_on_host
from train.recipe import Recipe
from train.recipe.sft_config import with_defaults


@dataclass(frozen=True)
class RunPlan:
    """Memory in bytes on one GPU (`host`: a GPU's share of its node's), FLOPs of the complete run, hours at that MFU.

    - `chosen`, `config_file`, `launch`: the first candidate that fits and has no caution, else the first that fits;
      None where none fits;
    - `fewest_nodes`: with the recipe's optimizer, and with 8-bit Adam.
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


def plan_run(
    recipe: Recipe,
    shape: Architecture,
    cluster: Cluster,
    documents: NDArray[np.integer],
    *,
    steps: int,
    epochs: float,
    sequences_per_step: int,
) -> RunPlan:
    """Plan a run on `cluster`.

    - `documents`: lengths in tokens of the rows that an epoch trains, [rows];
    - `steps`, `epochs`, `sequences_per_step`: from the schedule.
    """
    settings = with_defaults(recipe.training)
    optimizer = optimizer_name(recipe)
    length = recipe.data.max_length if recipe.data.packing else int(documents.max(initial=0))
    length = -(-length // recipe.model.sequence_parallel)  # of each GPU that shares a sequence
    strategies = list_strategies(cluster)
    candidates = [evaluate_candidate(recipe, shape, cluster, strategy, optimizer, length) for strategy in strategies]
    fitting = [(candidate.caution is not None, rank) for rank, candidate in enumerate(candidates) if candidate.fits]
    chosen = strategies[min(fitting)[1]] if fitting else None
    per_epoch = count_training_flops(shape, documents)
    flops = per_epoch.total * epochs
    hours = estimate_hours(flops, cluster.processes, cluster.peak_flops, cluster.mfu)
    return RunPlan(
        cluster=cluster,
        parameters=shape.total,
        trained_parameters=shape.trained,
        method="full" if recipe.adapter is None else "QLoRA" if recipe.quantization else "LoRA",
        optimizer=optimizer,
        tokens_per_gpu=settings["per_device_train_batch_size"] * length,
        checkpointing=uses_checkpointing(settings),
        candidates=candidates,
        chosen=chosen.name if chosen else None,
        config_file=_config_file(chosen, cluster) if chosen else None,
        launch=_launch(recipe, chosen, cluster, optimizer) if chosen else None,
        fewest_nodes=[find_fewest_nodes(recipe, shape, cluster, name, length) for name in list_optimizers(optimizer)],
        steps=steps,
        sequences_per_step=sequences_per_step,
        tokens=round(float(documents.sum()) * epochs),
        parameter_flops=per_epoch.parameters * epochs,
        attention_flops=per_epoch.attention * epochs,
        flops=flops,
        hours=hours,
        gpu_hours=hours * cluster.processes,
        convention=CONVENTION,
        notes=_notes(recipe, settings, optimizer, chosen),
    )


def _config_file(strategy: Strategy, cluster: Cluster) -> str:
    return strategy.config_file if cluster.processes > 1 or strategy.stage else "accelerate_configs/single_gpu.yaml"


def _launch(recipe: Recipe, strategy: Strategy, cluster: Cluster, optimizer: str) -> str:
    """Return the command that starts the run, for a shell."""
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


def _notes(recipe: Recipe, settings: dict[str, Any], optimizer: str, chosen: Strategy | None) -> list[str]:
    """Return sentences on the limits of the plan's figures for this recipe."""
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
    if is_selective(settings):
        notes.append("selective checkpointing is counted as none: between the two, at most that much")
    if settings.get("activation_offloading"):
        notes.append("training.activation_offloading moves activations to the host's memory; counted as if it didn't")
    if settings["label_smoothing_factor"] or settings.get("loss_type") not in (None, "nll"):
        notes.append("this loss may need all logits at once: the head takes more than is shown")
    return notes
