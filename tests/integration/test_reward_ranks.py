"""Reward models on two processes, with DDP and ZeRO-3: the losses and the model of one process."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from small_runs import Kind, once, read_metrics, write_recipe
from tiny_words import WORDS

pytest.importorskip("deepspeed")

ALONE, DDP, ZERO3 = Kind("alone"), Kind("ddp", 2), Kind("zero3", 2, "zero3.yaml")
NAMES = ("loss", "accuracy", "margin", "mean_reward")


def preference(*arguments: str) -> int:
    from train.preference import main

    return main(list(arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[Kind], Path]:
    """Return a function that trains a kind of run once: its folder."""
    rng = random.Random(5)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    rows = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with rows.open("w", encoding="utf-8") as lines:
        for _ in range(41):  # another number than a multiple of the processes
            row = {"system": text(3), "prompt": text(rng.randint(1, 9))}
            lines.write(json.dumps({**row, "chosen": text(rng.randint(1, 20)), "rejected": text(2)}) + "\n")

    def train(kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp(kind.name)
        recipe = write_recipe(
            folder / "recipe.yaml",
            tiny_model,
            rows,
            folder / "run",
            data={
                "sources": [{"path": str(rows)}], "max_length": 64, "validation": 0.2,
                "cache_dir": str(folder / "cache"),
            },
            training={
                "gradient_accumulation_steps": 4 // kind.processes, "max_steps": 4, "eval_strategy": "steps",
                "eval_steps": 2,
            },
            preference={"loss": "reward", "center_rewards_coefficient": 0.01},
        )  # fmt: skip
        logs = folder / "logs"
        launch(kind.processes, kind.config, "--recipe", recipe, logs=logs, job=preference).succeeded()
        return folder / "run"

    return once(train)


def select(run: Path, prefix: str) -> list[dict[str, Any]]:
    names = [f"{prefix}{name}" for name in NAMES]
    return [{name: line[name] for name in names} for line in read_metrics(run) if f"{prefix}loss" in line]


@pytest.mark.parametrize("kind", [DDP, ZERO3], ids=lambda kind: kind.name)
def test_two_processes_train_the_reward_model_of_one(kind: Kind, trained: Callable[[Kind], Path]) -> None:
    run, expected = trained(kind), trained(ALONE)
    for prefix, count in ("", 4), ("eval_", 2):
        ours, theirs = select(run, prefix), select(expected, prefix)
        assert len(ours) == len(theirs) == count
        for line, other in zip(ours, theirs, strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    weights, others = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == others.keys()
    assert "score.weight" in weights
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4, msg=name)
