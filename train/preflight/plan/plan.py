"""Memory and duration of a run before a GPU is requested: `train/sft.py --check --gpus 8x80GB --nodes 2`.

They follow from the recipe, the model's config and the lengths of the rows; no weights are loaded.
"""

import shlex
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.model.flops import CONVENTION, Flops, count_forward_flops, count_training_flops
from train.preflight.plan.candidates import (
    EIGHT_BIT_ADAM,
    Candidate,
    Candidates,
    FewestGpus,
    Workload,
    choose,
    evaluate_written,
    find_best,
    find_fewest,
    list_optimizers,
)
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.memory import Strategy
from train.preflight.plan.optimizer_states import KNOWN, is_paged, runs_on_host
from train.preflight.plan.settings import optimizer_name
from train.recipe import Recipe
from train.recipe.schedule import sharing_error
from train.recipe.sft_config import with_defaults


@dataclass(frozen=True)
class RunPlan:
    """Memory in bytes on one GPU (`host`: a GPU's share of its node's), FLOPs and hours of the complete run.

    - `candidates`: the best settings of each strategy; `written`: the recipe as written under each;
    - `chosen`, `config_file`, `overrides`, `launch`: the fastest candidate that fits; None where none fits; no `launch`
      either where model.sequence_parallel doesn't divide the GPUs;
    - `hours`: of the chosen candidate; where none fits, at the MFU of full checkpointing alone;
    - `reference_hours`: those of them before the first step, for the reference's log-probabilities (DPO);
    - `fewest_gpus`: with the recipe's optimizer, and with 8-bit Adam where that takes less;
    - `eight_bit`: the best candidate with 8-bit Adam on the GPU; None where none fits, or it takes no less.
    """

    cluster: Cluster
    parameters: int
    trained_parameters: int
    method: str
    optimizer: str
    tokens_per_sequence: int
    candidates: list[Candidate]
    written: list[Candidate]
    chosen: str | None
    config_file: str | None
    overrides: list[str] | None
    launch: str | None
    fewest_gpus: list[FewestGpus]
    eight_bit: Candidate | None
    steps: int
    sequences_per_step: int
    tokens: int
    parameter_flops: float
    attention_flops: float
    flops: float
    hours: float
    reference_hours: float
    gpu_hours: float
    convention: str
    notes: list[str]

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate."""
        return next((candidate for candidate in self.candidates if candidate.memory.strategy == self.chosen), None)


def plan_run(
    candidates: Candidates,
    cluster: Cluster,
    documents: NDArray[np.integer],
    *,
    steps: int,
    epochs: float,
    sequences_per_step: int,
) -> RunPlan:
    """Plan a run on `cluster`.

    - `candidates`: of the recipe;
    - `documents`: lengths in tokens of the rows that an epoch trains, [rows];
    - `steps`, `epochs`, `sequences_per_step`: from the schedule.
    """
    recipe, cluster = candidates.recipe, candidates.with_peak(cluster)
    per_epoch = count_training_flops(candidates.shape, documents)
    flops = Flops(per_epoch.parameters * epochs, per_epoch.attention * epochs)
    preference = recipe.preference
    reference = count_forward_flops(candidates.shape, documents) if preference and preference.loss == "dpo" else 0.0
    reference_hours = cluster.hours(reference)
    workload = Workload(
        steps, Flops(flops.parameters / max(steps, 1), flops.attention / max(steps, 1)), reference_hours
    )
    best = find_best(candidates, cluster, workload)
    chosen = choose(best)
    evaluated = candidates.evaluation_batch(chosen.settings, cluster) if chosen else None
    if chosen:
        more = [f"training.{key}=null" for key in distribution_keys(recipe)]
        more += [f"training.per_device_eval_batch_size={evaluated}"] if evaluated else []
        chosen = replace(chosen, overrides=[*chosen.overrides, *more])
    optimizer = optimizer_name(recipe)
    optimizers = list_optimizers(optimizer)
    eight_bit = find_best(candidates, cluster, workload, EIGHT_BIT_ADAM) if EIGHT_BIT_ADAM in optimizers[1:] else []
    unshared = sharing_error(recipe, cluster.processes)
    hours = chosen.hours if chosen else reference_hours + cluster.hours(flops.total)
    return RunPlan(
        cluster=cluster,
        parameters=candidates.shape.total,
        trained_parameters=candidates.shape.trained,
        method="full" if recipe.adapter is None else "QLoRA" if recipe.quantization else "LoRA",
        optimizer=optimizer,
        tokens_per_sequence=candidates.length,
        candidates=best,
        written=evaluate_written(candidates, cluster, workload),
        chosen=chosen.settings.strategy.name if chosen else None,
        config_file=config_file(chosen.settings.strategy, cluster) if chosen else None,
        overrides=chosen.overrides if chosen else None,
        launch=launch_command(recipe, chosen, cluster) if chosen and not unshared else None,
        fewest_gpus=[find_fewest(candidates, cluster, name) for name in optimizers],
        eight_bit=choose([candidate for candidate in eight_bit if not candidate.settings.strategy.offload]),
        steps=steps,
        sequences_per_step=sequences_per_step,
        tokens=round(float(documents.sum()) * epochs),
        parameter_flops=flops.parameters,
        attention_flops=flops.attention,
        flops=flops.total,
        hours=hours,
        reference_hours=reference_hours,
        gpu_hours=hours * cluster.processes,
        convention=CONVENTION,
        notes=[*filter(None, [unshared]), *_notes(recipe, with_defaults(recipe.training), chosen, evaluated)],
    )


def config_file(strategy: Strategy, cluster: Cluster) -> str:
    """Return the accelerate configuration of a strategy on `cluster`."""
    return strategy.config_file if cluster.processes > 1 or strategy.stage else "accelerate_configs/single_gpu.yaml"


def launch_command(recipe: Recipe, candidate: Candidate, cluster: Cluster) -> str:
    """Return the command that starts the run with a candidate's settings, for a shell."""
    strategy = candidate.settings.strategy
    words = ["accelerate launch --config_file", config_file(strategy, cluster)]
    if cluster.processes > 1:
        words.append(f"--num_processes {cluster.processes}")
    if cluster.nodes > 1:
        words.append(f"--num_machines {cluster.nodes} --machine_rank RANK --main_process_ip HOST")
        words.append("--main_process_port 29500")
    if cluster.nodes > 1 and strategy.stage:
        words.append("--deepspeed_multinode_launcher standard")
    changed = {override.partition("=")[0] for override in candidate.overrides}
    own = [override for override in recipe._origin.overrides if override.partition("=")[0] not in changed]
    words += [f"{recipe.command} --recipe", *map(shlex.quote, [recipe._origin.file, *own, *candidate.overrides])]
    return " ".join(words)


def distribution_keys(recipe: Recipe) -> list[str]:
    """Return the keys of `training` that decide how a run is split, in place of the launch configuration."""
    return [key for key in ("deepspeed", "fsdp") if recipe.training.get(key)]


def _notes(recipe: Recipe, settings: dict[str, Any], chosen: Candidate | None, evaluated: int | None) -> list[str]:
    """Return sentences on the limits of the plan's figures for this recipe."""
    optimizer, offload = optimizer_name(recipe), bool(chosen and chosen.settings.strategy.offload)
    notes = []
    if optimizer not in KNOWN:
        notes.append(f"training.optim: {optimizer} is counted as AdamW with float32 states: its own are not known here")
    if is_paged(optimizer):
        notes.append(f"training.optim: {optimizer} may move its states to the host's memory; counted as if it didn't")
    if offload and not runs_on_host(optimizer):
        notes.append(f"offload runs AdamW in float32 on the CPU, in place of {optimizer}")
    notes += [
        f"training.{key} in the recipe would decide how the run is split, whatever it is launched with: the command "
        "takes it out"
        for key in distribution_keys(recipe)
    ]
    if settings["activation_offloading"]:
        notes.append(
            "training.activation_offloading: the best settings are without it. As written, activations count as if "
            "they stayed on the GPU, and their transfers take no time"
        )
    if evaluated:
        notes.append(
            f"an evaluation of {settings['per_device_eval_batch_size']} sequences at once "
            f"(training.per_device_eval_batch_size) does not fit: the command has {evaluated}"
        )
    if settings["label_smoothing_factor"] or settings.get("loss_type") not in (None, "nll"):
        notes.append("this loss may need all logits at once: the head takes more than is shown")
    return notes
