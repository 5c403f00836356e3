"""Interrupted runs: killed at any moment or asked to stop, a run ends bit-identical to an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import LaunchResult, launch, sft
from safetensors.torch import load_file
from small_runs import Kind, once, read_metrics, write_recipe, write_rows

from train.loop.checkpoint.manifest import COMPLETE
from train.loop.throughput import TIMING_METRICS

pytest.importorskip("deepspeed")

STEPS = 12


KINDS = [
    Kind("alone"),
    Kind("alone-lora", adapter=True),
    Kind("ddp", 2),
    Kind("ddp-lora", 2, adapter=True),
    Kind("zero3", 2, "zero3.yaml"),
    Kind("zero3-lora", 2, "zero3.yaml", adapter=True),
]


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    folder_of_rows = tmp_path_factory.mktemp("rows")
    rows = [write_rows(folder_of_rows / f"{count}.jsonl", count, seed=count) for count in (32, 16)]

    def write(folder: Path, kind: Kind, **training: Any) -> Path:
        settings = {
            "gradient_accumulation_steps": 4 // kind.processes,
            "max_steps": STEPS,
            "logging_steps": 3,  # lines between checkpoints and checkpoints between lines
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 2,
            "save_total_limit": 2,
            **training,
        }
        data = {"sources": [{"path": str(path)} for path in rows], "validation": 0.2, "repack": True}
        # with an adapter: random numbers in the middle of a run; of two layers, as each has hooks under ZeRO-3
        adapter = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]} if kind.adapter else None
        recipe = folder / "recipe.yaml"
        return write_recipe(recipe, tiny_model, rows[0], folder / "run", data=data, training=settings, adapter=adapter)

    return write


@pytest.fixture(scope="module")
def untouched(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """Return a function that trains an uninterrupted run of a kind once: its folder."""

    def train(kind: Kind) -> Path:
        folder = tmp_path_factory.mktemp(kind.name)
        start(kind, recipe_of(folder, kind), folder).succeeded()
        return folder / "run"

    return once(train)


def start(kind: Kind, recipe: Path, folder: Path, *options: str, job: Callable[..., int | None] = sft) -> LaunchResult:
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    return launch(kind.processes, kind.config, "--recipe", recipe, *options, logs=logs, job=job)


def figures(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without timings."""
    clock = {*TIMING_METRICS, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    lines = read_metrics(run)
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def tensors(value: Any) -> list[torch.Tensor]:
    """Return all tensors of an object that torch.save wrote, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def assert_same(run: Path, other: Path) -> None:
    """Assert that weights, optimizer states and metrics are bit-identical."""
    weights = "adapter_model" if (other / "adapter_config.json").exists() else "model"
    state, expected_state = (load_file(folder / f"{weights}.safetensors") for folder in (run, other))
    assert state.keys() == expected_state.keys()
    assert [name for name in state if not torch.equal(state[name], expected_state[name])] == []
    names = sorted(str(path.relative_to(other)) for path in (other / f"checkpoint-{STEPS}").rglob("*.pt*"))
    names = [name for name in names if "optim" in name]
    assert names
    for name in names:
        states = [tensors(torch.load(folder / name, weights_only=False)) for folder in (run, other)]
        assert len(states[0]) == len(states[1]) > 3  # the steps, both moments and the weights
        assert all(torch.equal(first, second) for first, second in zip(*states, strict=True)), name
    assert figures(run) == figures(other)


def killed_at(*arguments: str, thread: str = "") -> int:
    """Train, and kill the process with SIGKILL after some lines of Python: `LINES,RANK`; rank -1 = all.

    Lines of saving and of the training loop count, ours and transformers', in threads whose name starts with `thread`.
    """
    *rest, moment = arguments
    lines, victim = map(int, moment.split(","))
    watched = (
        *(
            "transformers/trainer.py",
            "loop/trainer.py",
            "loop/evaluating.py",
            "loop/checkpointing.py",
            "loop/saving.py",
        ),
        *("serialization.py", "checkpoint/writer.py", "checkpoint/trainer_state.py"),
        *("checkpoint/manifest.py", "checkpoint/rank_store.py", "storage/checksum.py", "storage/atomic_write.py"),
    )
    counted = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal counted
        if event == "call":
            return trace if frame.f_code.co_filename.endswith(watched) else None
        counted += threading.current_thread().name.startswith(thread)
        if counted == lines and victim in (-1, int(os.environ.get("RANK", "0"))):
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    from train.loop.trainer import JanusTrainer

    begin = JanusTrainer.train

    def train(self: JanusTrainer, *args: Any, **kwargs: Any) -> Any:
        sys.settrace(trace)
        threading.settrace(trace)
        return begin(self, *args, **kwargs)

    JanusTrainer.train = train
    return sft(*rest)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(
    kind: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    expected = untouched(kind)
    recipe, rng, run = recipe_of(tmp_path, kind), random.Random(kind.name), tmp_path / "run"
    kills = 20 if kind.name == "alone" else 3
    while kills:
        moment = f"{rng.randint(1, 24_000)},{rng.choice([-1, 0, kind.processes - 1])}"
        outcome = start(kind, recipe, tmp_path, moment, job=killed_at)
        for folder in run.glob("checkpoint-*"):
            assert (folder / COMPLETE).exists()
        if -signal.SIGKILL in outcome.exit_codes:
            kills -= 1
            continue
        outcome.succeeded()  # it came to its end before that moment: once more from the beginning
        assert_same(run, expected)
        shutil.rmtree(run)
    start(kind, recipe, tmp_path).succeeded()
    assert_same(run, expected)
    assert len(list(run.glob("checkpoint-*"))) == 2
    assert not (run / "unfinished").exists()


def killed_in_background_at(*arguments: str) -> int:
    """Train, and kill the process after some lines of Python that complete a checkpoint: `LINES,RANK`."""
    return killed_at(*arguments, thread="checkpoint")


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[5]], ids=lambda kind: kind.name)
def test_a_run_killed_while_a_checkpoint_is_completed_has_the_ones_before_it(
    kind: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    recipe, rng, run = recipe_of(tmp_path, kind), random.Random(kind.name), tmp_path / "run"
    for _ in range(8 if kind.name == "alone" else 3):
        newest = max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")), default=0)
        moment = f"{rng.randint(1, 600)},{rng.choice([-1, 0, kind.processes - 1])}"
        outcome = start(kind, recipe, tmp_path, moment, job=killed_in_background_at)
        if -signal.SIGKILL not in outcome.exit_codes:
            break  # it came to its end before that moment
        steps = [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")]
        assert max(steps, default=0) >= newest
        assert all((run / f"checkpoint-{step}" / COMPLETE).exists() for step in steps)
    start(kind, recipe, tmp_path).succeeded()
    assert_same(run, untouched(kind))
    assert len(list(run.glob("checkpoint-*"))) == 2
    assert not (run / "unfinished").exists()


def completed_late(*arguments: str, job: Callable[..., int] = sft) -> int:
    """Train on a disk whose fsync takes until training is LAG steps further, or waits: `LAG,FILE`.

    FILE gets a line at the end of each step: its number and the newest checkpoint.
    """
    *rest, moment = arguments
    lag, file = moment.split(",")
    from transformers import TrainerCallback

    from train.loop.checkpoint import writer
    from train.loop.checkpoint.manifest import list_checkpoints
    from train.loop.checkpointing import CheckpointingTrainer
    from train.loop.trainer import JanusTrainer

    done, waits, step = threading.Condition(), 0, 0
    fsync, begin, finish = writer.fsync, JanusTrainer.train, CheckpointingTrainer._finish_save

    def slow_fsync(path: Path) -> None:
        saved = next((int(part.rpartition("-")[2]) for part in path.parts if part.startswith("checkpoint-")), 0)
        with done:
            assert done.wait_for(lambda: waits or step >= saved + int(lag), timeout=60)
        fsync(path)

    def finish_save(self: CheckpointingTrainer) -> None:
        nonlocal waits
        with done:
            waits += 1
            done.notify_all()
        finish(self)
        waits -= 1

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal step
            with done:
                step = state.global_step
                done.notify_all()
            if os.environ.get("RANK", "0") == "0":
                newest = next((path.name for path in list_checkpoints(args.output_dir)), "none")
                with Path(file).open("a") as lines:
                    lines.write(f"{step} {newest}\n")

    def train(self: JanusTrainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Count)
        return begin(self, *args, **kwargs)

    writer.fsync, JanusTrainer.train, CheckpointingTrainer._finish_save = slow_fsync, train, finish_save
    return job(*rest)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[4]], ids=lambda kind: kind.name)
def test_a_checkpoint_that_is_completed_steps_later_has_the_state_of_its_step(
    kind: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    expected, run = untouched(kind), tmp_path / "run"
    recipe = recipe_of(tmp_path, kind, save_steps=4, save_total_limit=3)
    start(kind, recipe, tmp_path, f"3,{tmp_path / 'steps.txt'}", job=completed_late).succeeded()
    lines = (tmp_path / "steps.txt").read_text().splitlines()
    assert lines[3:7] == [f"{step} none" for step in (4, 5, 6, 7)]  # 4 was saved after step 4, and not complete at 6
    # after step 7 it may be completed at any time, at the latest before 8 is saved, and likewise 8
    assert lines[8:11] == [f"{step} checkpoint-4" for step in (9, 10, 11)]
    assert lines[11] in ("12 checkpoint-4", "12 checkpoint-8")
    assert_same(run, expected)
    for later in (8, 12):
        shutil.rmtree(run / f"checkpoint-{later}")
    (run / "outcome.json").unlink()
    resumed = start(kind, recipe, tmp_path).succeeded()
    assert f"resuming from {run / 'checkpoint-4'}" in resumed.output[0]
    assert_same(run, expected)


def test_a_stop_waits_for_the_save_that_is_under_way(
    recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    kind, run = KINDS[2], tmp_path / "run"
    recipe = recipe_of(tmp_path, kind, save_steps=4)
    start(kind, recipe, tmp_path, "SIGTERM,6", f"9,{tmp_path / 'steps.txt'}", job=asked_with_a_late_save).succeeded()
    assert (tmp_path / "steps.txt").read_text().splitlines()[-1] == "6 none"
    assert sorted(path.parent.name for path in run.glob(f"*/{COMPLETE}")) == ["checkpoint-4", "checkpoint-6"]
    assert json.loads((run / "outcome.json").read_text(encoding="utf-8"))["outcome"] == "preempted"
    resumed = start(kind, recipe, tmp_path).succeeded()
    assert f"resuming from {run / 'checkpoint-6'}" in resumed.output[0]
    assert_same(run, untouched(kind))


def asked_with_a_late_save(*arguments: str) -> int:
    """Train as `completed_late` and `asked_at` do, with the moments of both."""
    *rest, asked, late = arguments
    return completed_late(*rest, late, job=lambda *others: asked_at(*others, asked))


def asked_at(*arguments: str) -> int:
    """Train, and ask the last rank to stop: `HOW,STEP`, in that step or in the evaluation after it (`.5`)."""
    *rest, moment = arguments
    how, _, step = moment.partition(",")
    from transformers import TrainerCallback

    from train.loop import preemption
    from train.loop import trainer as loop

    preemption._POLL_SECONDS = 0.0  # these runs are over within a second
    if how == "deadline":
        os.environ["SLURM_JOB_END_TIME"] = "1"

    class Ask(TrainerCallback):
        def __init__(self, output_dir: str) -> None:
            self.output_dir = output_dir

        def ask(self) -> None:
            if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
                if how == "file":
                    Path(self.output_dir, "stop").touch()
                elif how != "deadline":
                    os.kill(os.getpid(), getattr(signal, how))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == float(step):
                self.ask()

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 0.5 == float(step):
                self.ask()

    begin = loop.JanusTrainer.train

    def train(self: loop.JanusTrainer, *args: Any, **kwargs: Any) -> Any:
        self.callback_handler.callbacks.insert(0, Ask(self.args.output_dir))
        return begin(self, *args, **kwargs)

    loop.JanusTrainer.train = train
    return sft(*rest)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2], KINDS[5]], ids=lambda kind: kind.name)
def test_a_run_asked_to_stop_saves_and_ends_like_an_uninterrupted_one(
    kind: Kind, recipe_of: Callable[..., Path], untouched: Callable[[Kind], Path], tmp_path: Path
) -> None:
    """By signals, Ctrl-C, a file and the time limit; at the end of an epoch and inside an evaluation."""
    expected = untouched(kind)
    recipe, run = recipe_of(tmp_path, kind, save_steps=100), tmp_path / "run"
    step = 0
    for how, moment in (
        ("SIGTERM", 1),
        ("SIGUSR1", 3),
        ("SIGUSR1", 4.5),
        ("file", 7),
        ("SIGINT", 8.5),
        ("deadline", 0),
    ):
        outcome = start(kind, recipe, tmp_path, f"{how},{moment}", job=asked_at).succeeded()
        ended = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
        assert ended["outcome"] == "preempted"
        assert ended["step"] > step or how == "deadline"
        step = ended["step"]
        assert step == int(moment) or how == "deadline"
        assert json.loads((run / f"checkpoint-{step}" / COMPLETE).read_text(encoding="utf-8"))["step"] == step
        assert "stopping: " in outcome.output[0]
        assert not (run / "stop").exists()
        assert not (run / "model.safetensors").exists()
        if step >= STEPS - 1:
            break
    start(kind, recipe, tmp_path).succeeded()
    assert json.loads((run / "outcome.json").read_text(encoding="utf-8"))["outcome"] == "finished"
    assert figures(run) == figures(expected)
    weights = "adapter_model" if kind.adapter else "model"
    state, expected_state = (load_file(folder / f"{weights}.safetensors") for folder in (run, expected))
    assert [name for name in state if not torch.equal(state[name], expected_state[name])] == []
