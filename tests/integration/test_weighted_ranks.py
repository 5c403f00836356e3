"""Loss weights over processes: DDP, ZeRO-3 and shared sequences give the losses and weights of one process."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import launch
from small_runs import read_metrics, write_recipe, write_rows
from test_sharded_training import EPSILON, LEARNING_RATE, NOISE_OF_LOSS, SAVED_AT, STEPS, Trained, compare

pytest.importorskip("deepspeed")

WEIGHTS = (0.25, 1, 1, 4)


def weigh(path: Path, seed: int) -> Path:
    """Give the rows of a file loss weights, in the row and in the answer."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["messages"][-1]["weight"] = rng.choice(WEIGHTS)
        row["loss_weight"] = rng.choice(WEIGHTS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SETTINGS = {
    "alone": (1, None, 1),
    "ddp": (2, None, 1),
    "zero3": (2, "zero3.yaml", 1),
    "shared": (2, None, 2),
}
"""Processes, accelerate's configuration, processes that share a sequence."""


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains a setting once; with `resumed` from a checkpoint half-way, in another folder."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 40, seed=11, system=20, user=10, answers=(1, 5, 40, 120))
    plain = write_rows(root / "plain.jsonl", 24, seed=12, system=20, user=10, answers=(1, 5, 40, 120))
    held_out = write_rows(root / "held-out.jsonl", 9, seed=5, system=20, user=10, answers=(1, 5, 40, 120))
    for seed, path in enumerate((rows, held_out)):
        weigh(path, seed)
    runs: dict[tuple[str, bool], Trained] = {}

    def run(name: str, *, resumed: bool = False) -> Trained:
        if (name, resumed) in runs:
            return runs[name, resumed]
        processes, config, sharing = SETTINGS[name]
        folder = root / (f"{name}-resumed" if resumed else name)
        if resumed:
            run(name)
            shutil.copytree(root / name / f"checkpoint-{SAVED_AT}", folder / f"checkpoint-{SAVED_AT}")
        training = {
            "learning_rate": LEARNING_RATE,
            "adam_epsilon": EPSILON,
            "lr_scheduler_type": "linear",
            "gradient_accumulation_steps": 8 * sharing // processes,
            "per_device_eval_batch_size": 1,
            "max_steps": STEPS,
            "save_steps": SAVED_AT,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
        }
        data = {
            "sources": [{"path": str(rows)}, {"path": str(plain), "loss_weight": 0.3}],
            "validation": [{"path": str(held_out), "loss_weight": 2.0}],
        }
        recipe = write_recipe(root / f"{folder.name}.yaml", tiny_model, rows, folder, data=data, training=training)
        arguments = ["--recipe", recipe, f"model.sequence_parallel={sharing}"]
        outcome = launch(processes, config, *arguments, logs=root / f"{folder.name}-logs").succeeded()
        assert "of 64 training rows have a loss weight other than 1" in " ".join(outcome.output[0].split())
        assert resumed == ("resuming from" in outcome.output[0])
        runs[name, resumed] = Trained.read(folder, lora=False)
        return runs[name, resumed]

    return run


@pytest.mark.parametrize("name", ["ddp", "zero3", "shared"])
def test_processes_train_the_model_of_one(name: str, train: Callable[..., Trained]) -> None:
    alone, spread = train("alone"), train(name)
    assert alone.losses[0] - alone.losses[-1] > 0.1
    loss, norm, weights = compare(spread, alone)
    assert loss < NOISE_OF_LOSS
    assert norm < NOISE_OF_LOSS
    assert weights < 1
    (expected,), (actual,) = (
        [line for line in read_metrics(run.folder) if "eval_loss" in line] for run in (alone, spread)
    )
    for metric in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(name: str, train: Callable[..., Trained]) -> None:
    whole, resumed = train(name), train(name, resumed=True)
    assert resumed.losses == pytest.approx(whole.losses, rel=NOISE_OF_LOSS)
    assert compare(resumed, whole)[2] < 1
