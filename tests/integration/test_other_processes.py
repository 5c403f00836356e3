"""Resuming on another number of processes: the same sequences per step, the same losses up to rounding."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LaunchResult, launch
from safetensors.torch import load_file
from small_runs import write_recipe, write_rows

pytest.importorskip("deepspeed")

STEPS = 6
NOISE_OF_LOSS = 2e-6
"""Relative; see test_sharded_training.py, which bounds the same sums in other orders."""
NOISE_OF_WEIGHTS = 5e-3
"""Of the largest change of a tensor; as there."""


@dataclass(frozen=True)
class Kind:
    """Processes and configuration of a run."""

    name: str
    config: str | None = None
    adapter: bool = False


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., "Trained"]:
    """Return a function that trains a kind; `after`: the run and the step to resume from."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 48, seed=31)
    runs: dict[Any, Trained] = {}

    def train(kind: Kind, processes: int, after: tuple["Trained", int] | None = None, **training: Any) -> Trained:
        key = (kind, processes, after and (after[0].folder, after[1]), json.dumps(training))
        if key in runs:
            return runs[key]
        folder = root / f"{kind.name}-{len(runs)}"
        options: list[str | Path] = []
        if after:
            options = ["--resume", folder / "run" / f"checkpoint-{after[1]}"]
            shutil.copytree(after[0].folder / f"checkpoint-{after[1]}", folder / "run" / f"checkpoint-{after[1]}")
        settings = {
            "learning_rate": 2e-3,
            "adam_epsilon": 1e-6,
            "weight_decay": 0.1,  # of some weights, and not of others: two groups in the optimizer
            "lr_scheduler_type": "linear",
            "gradient_accumulation_steps": 1 if after else 4 // processes,  # a resumed run keeps four per step
            "max_steps": STEPS,
            "save_steps": 2,
            **training,
        }
        data = {"cache_dir": str(root / "cache"), "validation": 0.2}
        adapter = {"r": 4, "modules_to_save": ["lm_head"]} if kind.adapter else None
        recipe = write_recipe(
            folder / "recipe.yaml", tiny_model, rows, folder / "run", data=data, training=settings, adapter=adapter
        )
        outcome = launch(
            processes,
            kind.config,
            "--recipe",
            recipe,
            *options,
            folder / "steps",
            logs=folder / "logs",
            job=noting_steps,
        )
        runs[key] = Trained(folder / "run", outcome, kind.adapter)
        return runs[key]

    return train


def noting_steps(*arguments: str) -> int:
    """Train, and write this rank's sequences of each step."""
    from ranks import sft

    from train.loop.trainer import JanusTrainer

    *rest, report = arguments
    seen: dict[int, list[int]] = {}
    count = JanusTrainer._count

    def counting(self: JanusTrainer, batch: Any, sums: Any) -> None:
        seen.setdefault(self.state.global_step + 1, []).extend(batch.sequences)
        count(self, batch, sums)

    JanusTrainer._count = counting
    code = sft(*rest)
    Path(f"{report}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen), encoding="utf-8")
    return code


class Trained:
    """Results of a run."""

    def __init__(self, folder: Path, outcome: LaunchResult, adapter: bool) -> None:
        self.folder, self.outcome, self._adapter = folder, outcome, adapter

    @property
    def losses(self) -> dict[int, float]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / ("adapter_model.safetensors" if self._adapter else "model.safetensors"))

    @property
    def sequences(self) -> dict[int, Counter[int]]:
        """Return the sequences of each step on all ranks, with their counts."""
        steps: dict[int, Counter[int]] = {}
        for file in self.folder.parent.glob("steps-*.json"):
            for step, seen in json.loads(file.read_text(encoding="utf-8")).items():
                steps.setdefault(int(step), Counter()).update(seen)
        return steps


def assert_resumes_like(run: Trained, other: Trained, start: int, before: dict[str, torch.Tensor]) -> None:
    run.outcome.succeeded()
    assert run.sequences == {step: seen for step, seen in other.sequences.items() if step > start}
    # The steps before are told by the checkpoint, which another number of processes wrote.
    assert run.losses == pytest.approx(other.losses, rel=NOISE_OF_LOSS)
    for name, weight in other.weights.items():
        moved = (weight - before.get(name, torch.zeros(()))).abs().max()
        assert (run.weights[name] - weight).abs().max() < NOISE_OF_WEIGHTS * moved, name
    assert not (run.folder / "universal").exists()


CHAINS = [
    (Kind("ddp"), [4, 2, 1]),
    (Kind("ddp"), [2, 4]),
    (Kind("ddp-lora", adapter=True), [2, 1]),
    (Kind("zero1", "zero1.yaml"), [2, 1]),
    (Kind("zero2-lora", "zero2.yaml", adapter=True), [1, 2]),
    (Kind("zero3", "zero3.yaml"), [4, 2]),
    (Kind("zero3-lora", "zero3.yaml", adapter=True), [2, 4]),
]


@pytest.mark.parametrize(
    ("kind", "sizes"), CHAINS, ids=[f"{kind.name}-{'-'.join(map(str, sizes))}" for kind, sizes in CHAINS]
)
def test_a_run_resumes_with_the_same_sequences_in_each_step(
    kind: Kind, sizes: list[int], trained: Callable[..., Trained], tiny_model: Path
) -> None:
    """Each run of a chain resumes from the one before it; all equal the first, which was not interrupted."""
    alone = trained(kind, sizes[0])
    alone.outcome.succeeded()
    assert {len(seen) for seen in alone.sequences.values()} == {4}
    before = {} if kind.adapter else load_file(tiny_model / "model.safetensors")
    last = alone
    for step, size in zip((2, 4), sizes[1:], strict=False):
        run = trained(kind, size, after=(last, step))
        assert_resumes_like(run, alone, step, before)
        assert f"training.gradient_accumulation_steps is {4 // size}" in run.outcome.output[0] or size == 4
        text = "".join(run.outcome.output)
        assert ("converting checkpoint-" in text) == (kind.config is not None)
        last = run


@pytest.mark.parametrize("kind", [Kind("zero2", "zero2.yaml"), Kind("zero3", "zero3.yaml")], ids=lambda kind: kind.name)
def test_the_best_model_is_loaded_on_any_number_of_processes(kind: Kind, trained: Callable[..., Trained]) -> None:
    """At a learning rate that ruins the model the first checkpoint, of two processes, is the best."""
    ruinous = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "load_best_model_at_end": True}
    settings = {**ruinous, "eval_strategy": "steps", "eval_steps": 2}
    run: Trained | None = None
    for processes in 2, 1:
        run = trained(kind, processes, after=run and (run, 2), **settings)
        run.outcome.succeeded()
        lines = list(map(json.loads, (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
        state = json.loads((run.folder / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
        best = state["best_global_step"]
        assert lines[-1]["loaded_step"] == best
        assert processes == 1 or best == 2
        assert state["best_model_checkpoint"] == str(run.folder / f"checkpoint-{best}")
        saved = load_file(run.folder / f"checkpoint-{best}" / "model.safetensors")
        assert all(torch.equal(weight, saved[name]) for name, weight in run.weights.items())
        assert not (run.folder / "universal").exists()


@pytest.mark.parametrize(
    ("optimizer", "moment"),
    [
        ("adafactor", "the model is loaded"),  # only its file says which states it has
        ("adamw_bnb_8bit", "before"),
    ],
)
def test_states_that_cannot_be_converted_are_refused(
    optimizer: str, moment: str, trained: Callable[..., Trained]
) -> None:
    """DeepSpeed's converter joins Adam's states in full precision only."""
    pytest.importorskip("bitsandbytes")
    kind = Kind("zero2", "zero2.yaml")
    run = trained(kind, 2, optim=optimizer, max_steps=2)
    run.outcome.succeeded()
    other = trained(kind, 1, after=(run, 2), optim=optimizer, max_steps=2)
    assert other.outcome.exit_codes == [2]
    output = other.outcome.output[0]
    assert output.count("error: --resume: ") == 1
    assert "can't be converted for " in output
    assert "Resume with 2 processes" in output
    assert "Traceback" not in output
    assert ("loading " in output) == (moment == "the model is loaded")


def test_a_number_of_processes_that_cannot_share_a_step_is_refused(trained: Callable[..., Trained]) -> None:
    run = trained(Kind("ddp"), 4)
    other = trained(Kind("ddp"), 3, after=(run, 2))
    assert other.outcome.exit_codes == [2, 2, 2]
    assert (
        "had 4 sequences a step (4 processes), which 3 processes with batches of 1 can't share evenly"
        in (other.outcome.output[0])
    )
