"""Sharding within nodes, on four CPU ranks as two nodes of two: the losses of plain sharding, with less traffic between.

accelerate_configs/zero3_hpz_multinode.yaml and hsdp_multinode.yaml, with nodes of two ranks in place of eight.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from ranks import ROOT, launch
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows

pytest.importorskip("deepspeed")

RANKS, NODE = 4, 2
STEPS, MICRO_BATCHES = 2, 2


class Trained(NamedTuple):
    """Losses and gradient norms of all steps; elements that rank 0 gathered, by the number of ranks that took part."""

    losses: list[float]
    norms: list[float]
    gathered: dict[str, int]


def count_gathers(report: str, *arguments: str) -> int:
    """Run train/sft.py; write the number of elements that were gathered while it trained, by size of the group."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from train.loop.trainer import JanusTrainer
    from train.sft import main

    elements: Counter[int] = Counter()

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.name() == "c10d::_allgather_base_":
                elements[args[0].numel() // args[1].numel()] += args[0].numel()
            return op(*args, **(kwargs or {}))

    training_step = JanusTrainer.training_step

    def recorded_step(self: JanusTrainer, *inputs: Any, **keywords: Any) -> Any:
        with Gathers():
            return training_step(self, *inputs, **keywords)

    JanusTrainer.training_step = recorded_step
    code = main(list(arguments))
    if os.environ["RANK"] == "0":
        Path(report).write_text(json.dumps(elements))
    return code


def with_small_nodes(name: str, folder: Path) -> Path:
    """Write a launch configuration of several nodes for one machine, whose ranks form nodes of NODE."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / name).read_text())
    if "parallelism_config" in config:
        assert config["parallelism_config"]["parallelism_config_dp_replicate_size"] == RANKS // NODE
        config["parallelism_config"]["parallelism_config_dp_shard_size"] = NODE
    else:
        deepspeed = json.loads((ROOT / config["deepspeed_config"]["deepspeed_config_file"]).read_text())
        deepspeed["zero_optimization"]["zero_hpz_partition_size"] = NODE
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
        config["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
    (folder / name).write_text(yaml.safe_dump(config | {"num_machines": 1, "machine_rank": 0}))
    return folder / name


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Return a function that trains with a launch configuration."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 40, seed=1)

    def train(name: str) -> Trained:
        folder = root / Path(name).stem
        training = {"gradient_checkpointing": True, "gradient_accumulation_steps": MICRO_BATCHES, "max_steps": STEPS}
        recipe = write_recipe(
            folder / "recipe.yaml", tiny_model, rows, folder / "run", data={}, training={**training, "save_steps": 2}
        )
        config = str(with_small_nodes(name, folder)) if "multinode" in name else name
        report = folder / "gathered.json"
        launch(RANKS, config, report, "--recipe", recipe, job=count_gathers, logs=folder / "logs").succeeded()
        lines = read_metrics(folder / "run")
        steps = [line for line in lines if "loss" in line]
        assert (folder / "run" / f"checkpoint-{STEPS}" / "COMPLETE.json").is_file()
        gathered = json.loads(report.read_text())
        return Trained([step["loss"] for step in steps], [step["grad_norm"] for step in steps], gathered)

    return train


@pytest.fixture(scope="module")
def parameters(tiny_model: Path) -> int:
    return sum(weight.numel() for weight in load_file(tiny_model / "model.safetensors").values())


def test_hpz_gathers_weights_from_other_nodes_once_per_step(trained: Callable[[str], Trained], parameters: int) -> None:
    plain, hierarchical = trained("zero3.yaml"), trained("zero3_hpz_multinode.yaml")
    assert (hierarchical.losses, hierarchical.norms) == (plain.losses, plain.norms)
    assert len(plain.losses) == STEPS
    assert plain.gathered.keys() == {str(RANKS)}
    assert plain.gathered[str(RANKS)] >= 2 * MICRO_BATCHES * STEPS * parameters  # forward and backward of each
    across, within = hierarchical.gathered[str(RANKS)], hierarchical.gathered[str(NODE)]
    assert across == pytest.approx((STEPS - 1) * parameters, rel=0.1)  # the first step has the copies of loading
    assert within > across


def test_hsdp_gathers_weights_within_nodes_only(trained: Callable[[str], Trained]) -> None:
    """Sums of gradients are taken in another order: within nodes, then between them."""
    plain, hierarchical = trained("fsdp2.yaml"), trained("hsdp_multinode.yaml")
    assert hierarchical.losses == pytest.approx(plain.losses, rel=1e-6)
    assert hierarchical.norms == pytest.approx(plain.norms, rel=1e-6)
    assert plain.gathered.keys() == {str(RANKS)}
    assert hierarchical.gathered.keys() == {str(NODE)}


def test_a_node_that_does_not_divide_the_ranks_is_an_error(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    config = with_small_nodes("zero3_hpz_multinode.yaml", tmp_path)
    outcome = launch(3, str(config), "--recipe", recipe_file(), logs=tmp_path / "logs")
    assert outcome.exit_codes == [2, 2, 2]
    assert (
        "".join(outcome.output).count("`zero_optimization.zero_hpz_partition_size: 2`, which doesn't divide the 3 ")
        == 1
    )
