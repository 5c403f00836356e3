"""Preference training and reward models on two processes: the loss of one, and bit-identical ends of killed runs."""

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import LaunchResult, launch
from safetensors.torch import load_file
from small_runs import Kind, once, read_metrics, write_recipe
from tiny_words import WORDS

from train.loop.throughput import TIMING_METRICS

pytest.importorskip("deepspeed")

SECTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "loss_type": ["sigmoid", "sft"]},
    "reward": {"loss": "reward", "center_rewards_coefficient": 0.01},
}
TOLERANCES: dict[str, dict[str, Any]] = {"dpo": {"rtol": 1e-3, "atol": 1e-3}, "reward": {"rtol": 0, "atol": 1e-4}}
"""Of the weights on two processes."""
KILLS = {"dpo": ((2, 0), (13, 1), (8, 0)), "reward": ((3, 0), (7, 1))}
"""Of each loss the forward passes in which a run is killed, and the rank: `dpo` begins with those of the reference."""


@dataclass(frozen=True)
class PairKind(Kind):
    """Processes and configuration of a run, and its loss."""

    loss: str = "dpo"

    @property
    def weights(self) -> str:
        """Return the name of the file of its weights."""
        return "adapter_model.safetensors" if self.adapter else "model.safetensors"


ALONE, DDP, ZERO3 = PairKind("alone"), PairKind("ddp", 2), PairKind("zero3", 2, "zero3.yaml")
ZERO3_LORA = PairKind("zero3-lora", 2, "zero3.yaml", adapter=True)
REWARD_DDP, REWARD_ZERO3 = (replace(kind, name=f"reward-{kind.name}", loss="reward") for kind in (DDP, ZERO3))


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[Path, PairKind], Path]:
    rng = random.Random(5)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    rows = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with rows.open("w", encoding="utf-8") as lines:
        for _ in range(41):  # another number than a multiple of the processes
            row = {"system": text(3), "prompt": text(rng.randint(1, 9))}
            lines.write(json.dumps({**row, "chosen": text(rng.randint(1, 20)), "rejected": text(2)}) + "\n")

    def write(folder: Path, kind: PairKind) -> Path:
        data = {"max_length": 64, "validation": 0.2, "cache_dir": str(folder / "cache")}
        training = {
            "gradient_accumulation_steps": 4 // kind.processes,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 1,
        }
        return write_recipe(
            folder / "recipe.yaml",
            tiny_model,
            rows,
            folder / "run",
            data={"sources": [{"path": str(rows)}], **data},
            training=training,
            preference=SECTIONS[kind.loss],
            adapter={"r": 4, "target_modules": ["q_proj", "v_proj"]} if kind.adapter else None,
        )

    return write


@pytest.fixture(scope="module")
def untouched(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains an uninterrupted run of a kind once: its folder."""

    def train(kind: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind.name)
        start(kind, folder, recipe_of(folder, kind)).succeeded()
        return folder / "run"

    return once(train)


def preference(*arguments: str) -> int:
    from train.preference import main

    return main(list(arguments))


def start(kind: Kind, folder: Path, *arguments: Any, job: Callable[..., int] = preference) -> LaunchResult:
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    return launch(kind.processes, kind.config, "--recipe", *arguments, logs=logs, job=job)


def figures(run: Path) -> list[dict[str, Any]]:
    clock = {*TIMING_METRICS, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in read_metrics(run)]


def log_probs(run: Path) -> np.ndarray:
    with np.load(run / "reference.npz") as arrays:
        return arrays["log_probs"]


@pytest.mark.parametrize("kind", [DDP, ZERO3, REWARD_DDP, REWARD_ZERO3], ids=lambda kind: kind.name)
def test_two_processes_train_like_one(kind: PairKind, untouched: Callable[..., Path]) -> None:
    """The loss is the mean over the pairs of a step, and over its chosen tokens, on all processes."""
    run, alone = untouched(kind), untouched(replace(ALONE, loss=kind.loss))
    if kind.loss == "dpo":
        np.testing.assert_allclose(log_probs(run), log_probs(alone), rtol=1e-5)
    tolerance = TOLERANCES[kind.loss]
    for line, expected in zip(figures(run), figures(alone), strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=tolerance["atol"], abs=tolerance["atol"] / 10), name
    weights, expected_weights = (load_file(folder / kind.weights) for folder in (run, alone))
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, **tolerance, msg=name)


def killed_at(*arguments: str) -> int:
    """Train, and kill a rank in one of its forward passes: `NUMBER,RANK`."""
    *rest, moment = arguments
    number, victim = map(int, moment.split(","))
    from train.finetune import choose_trainer
    from train.recipe import load_recipe

    trainer: Any = choose_trainer(load_recipe(rest[-1]))
    score, passes = trainer._score, 0

    def counted(*inputs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == number and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(*inputs)

    trainer._score = counted
    return preference(*rest)


@pytest.mark.parametrize("kind", [DDP, ZERO3, ZERO3_LORA, REWARD_DDP, REWARD_ZERO3], ids=lambda kind: kind.name)
def test_a_run_that_is_killed_ends_like_an_uninterrupted_one(
    kind: PairKind, recipe_of: Callable[..., Path], untouched: Callable[..., Path], tmp_path: Path
) -> None:
    """In the reference pass, in training or in evaluation, one process or the other."""
    expected, recipe = untouched(kind), recipe_of(tmp_path, kind)
    for number, victim in KILLS[kind.loss]:
        result = start(kind, tmp_path, recipe, f"{number},{victim}", job=killed_at)
        assert -signal.SIGKILL in result.exit_codes, result.output[0][-3000:]
    start(kind, tmp_path, recipe).succeeded()
    if kind.loss == "dpo":
        assert np.array_equal(log_probs(tmp_path / "run"), log_probs(expected))
    assert figures(tmp_path / "run") == figures(expected)
    weights, expected_weights = (load_file(run / kind.weights) for run in (tmp_path / "run", expected))
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
