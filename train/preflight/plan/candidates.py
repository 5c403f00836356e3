"""Search for the strategies and numbers of nodes under which a run fits."""

from dataclasses import dataclass, replace
from typing import Any

from train.model.architecture import Architecture
from train.preflight.plan.activation_formulas import Precision, estimate_activations
from train.preflight.plan.cluster import MAX_GPUS, Cluster
from train.preflight.plan.memory import DDP, STRATEGIES, Memory, StateSettings, Strategy, estimate_memory
from train.preflight.plan.optimizer_states import runs_on_host
from train.recipe import Recipe
from train.recipe.sft_config import with_defaults

EIGHT_BIT_ADAM = "adamw_bnb_8bit"
MAX_NODES = 64
"""Nodes up to which a fit is searched for."""
_DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' with torch 2.8 or newer
_ITEMSIZES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Candidate:
    """Memory of a run under one strategy.

    `fits`: with RESERVE of each GPU left free. `caution`: the reason not to choose it although it fits.
    """

    memory: Memory
    fits: bool
    caution: str | None


@dataclass(frozen=True)
class FewestNodes:
    """The fewest nodes on which the run fits without offload, with `optimizer` as `training.optim`.

    `nodes` and `strategy`: None where it fits on no number of nodes up to MAX_NODES. `here`: the strategy under which
    it fits the cluster as given; None where it doesn't.
    """

    optimizer: str
    nodes: int | None
    strategy: str | None
    here: str | None


def optimizer_name(recipe: Recipe) -> str:
    """Return the recipe's `training.optim`, or transformers' default."""
    return str(recipe.training.get("optim") or _DEFAULT_OPTIMIZER)


def uses_checkpointing(settings: dict[str, Any]) -> bool:
    """Return whether activations are computed again in the backward pass. `settings`: `training` with its defaults."""
    choice = settings.get("activation_checkpointing")
    return bool(settings["gradient_checkpointing"] if choice is None else choice)


def is_selective(settings: dict[str, Any]) -> bool:
    """Return whether TRL's selective checkpointing is on. `settings`: `training` with its defaults."""
    return bool((settings.get("gradient_checkpointing_kwargs") or {}).get("selective"))


def list_strategies(cluster: Cluster) -> list[Strategy]:
    """Return the strategies to choose from: one GPU has nobody to share states with."""
    return [strategy for strategy in STRATEGIES if cluster.processes > 1 or strategy is DDP or strategy.offload]


def list_optimizers(optimizer: str) -> list[str]:
    """Return the recipe's optimizer, and 8-bit Adam if it takes less."""
    return [optimizer] if "8bit" in optimizer or "adafactor" in optimizer else [optimizer, EIGHT_BIT_ADAM]


def evaluate_candidate(
    recipe: Recipe, shape: Architecture, cluster: Cluster, strategy: Strategy, optimizer: str, length: int
) -> Candidate:
    """Estimate the memory of a run under `strategy` with sequences of `length` tokens, and compare it with a GPU's."""
    settings = with_defaults(recipe.training)
    half = bool(settings["fp16"]) or settings.get("bf16") is not False
    state_settings = StateSettings(
        gpus=cluster.processes,
        optimizer=optimizer if not strategy.offload or runs_on_host(optimizer) else "adamw_torch",
        low_precision=half,
        storage_itemsize=_ITEMSIZES[recipe.quantization.bnb_4bit_quant_storage] if recipe.quantization else 2,
        double_quant=recipe.quantization.bnb_4bit_use_double_quant if recipe.quantization else True,
    )
    body = next(parameter.itemsize for parameter in shape.parameters if parameter.role != "adapter")
    weights = body if strategy.stage == 0 else 2 if half else 4
    activations = estimate_activations(
        shape,
        settings["per_device_train_batch_size"] * length,
        Precision(weights, min(weights, 2) if half else weights),
        checkpointing=uses_checkpointing(settings) and not is_selective(settings),
        adapter_dropout=bool(recipe.adapter and recipe.adapter.lora_dropout),
        squared_length=length if recipe.model.attention == "eager" else 0,
    )
    memory = estimate_memory(shape, strategy, state_settings, activations)
    no_master_weights = strategy.stage == 0 and recipe.adapter is None and weights == 2
    return Candidate(
        memory,
        memory.total <= cluster.usable_memory,
        "but 16-bit weights without float32 copies lose small updates" if no_master_weights else None,
    )


def find_fewest_nodes(
    recipe: Recipe, shape: Architecture, cluster: Cluster, optimizer: str, length: int
) -> FewestNodes:
    """Search for the fewest nodes of such GPUs on which a strategy without offload and caution fits."""

    def fitting_strategy(nodes: int) -> str | None:
        tried = replace(cluster, nodes=nodes)
        for strategy in list_strategies(tried):
            if not strategy.offload:
                candidate = evaluate_candidate(recipe, shape, tried, strategy, optimizer, length)
                if candidate.fits and not candidate.caution:
                    return strategy.name
        return None

    here = fitting_strategy(cluster.nodes)
    for nodes in range(1, min(MAX_NODES, MAX_GPUS // cluster.gpus) + 1):
        if strategy := fitting_strategy(nodes):
            return FewestNodes(optimizer, nodes, strategy, here)
    return FewestNodes(optimizer, None, None, here)
