"""Samples on several processes, and runs that end while they generate: the samples and the model of one whole run."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, LaunchResult, launch, sft
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows

from train.loop.throughput import TIMING_METRICS

pytest.importorskip("deepspeed")

STEPS = 4
HELD_OUT = ROOT / "recipes" / "smollm2-135m" / "data" / "held_out.jsonl"


@dataclass(frozen=True)
class Setting:
    """Processes, of which `shared` train each sequence together."""

    processes: int = 1
    config: str | None = None
    shared: int = 1
    lora: bool = False

    @property
    def name(self) -> str:
        kind = Path(self.config).stem if self.config else "alone" if self.processes == 1 else "ddp"
        return f"{kind}{'-shared' * (self.shared > 1)}{'-lora' * self.lora}"


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[Setting, Path], Path]:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 48, seed=23)
    prompts = rows.with_name("prompts.jsonl")
    with prompts.open("w", encoding="utf-8") as lines:
        for words in (1_015, 1_018, 1_019):  # 8, 2 and 0 tokens are left of the context of 2,048
            lines.write(json.dumps({"messages": [{"role": "user", "content": "river " * words}]}) + "\n")

    def write(setting: Setting, folder: Path) -> Path:
        return write_recipe(
            folder / "recipe.yaml",
            tiny_model,
            rows,
            folder / "run",
            data={"validation": 0.2},
            training={
                "gradient_checkpointing": True,
                "learning_rate": 2e-2,
                "adam_epsilon": 1e-3,  # tests/integration/test_sharded_training.py explains it
                "gradient_accumulation_steps": 4 * setting.shared // setting.processes,
                "max_steps": STEPS,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "eval_on_start": True,
                "save_steps": 1,
            },
            adapter={"r": 4} if setting.lora else None,
            # Seven rows in batches of three: under two processes one has no batch in the last round.
            evaluation={
                "rules": {"path": str(HELD_OUT), "rows": 7},
                "turns": {"conversations": 2, "turns": 2},
                "prompts": {"path": str(prompts)},
                "max_new_tokens": 10,
                "batch_size": 3,
            },
        )

    return write


@pytest.fixture(scope="module")
def trained(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], Path]:
    """Return a function that trains a setting once: the folder of its run."""
    runs: dict[Setting, Path] = {}

    def train(setting: Setting) -> Path:
        if setting not in runs:
            folder = tmp_path_factory.mktemp(setting.name)
            start(setting, recipe_of(setting, folder), folder).succeeded()
            runs[setting] = folder / "run"
        return runs[setting]

    return train


def start(
    setting: Setting, recipe: Path, folder: Path, *options: str, job: Callable[..., int | None] = sft
) -> LaunchResult:
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    arguments = ["--recipe", recipe, f"model.sequence_parallel={setting.shared}", *options]
    return launch(setting.processes, setting.config, *arguments, logs=logs, job=job)


def read_samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "setting",
    [
        Setting(2),
        Setting(2, "zero3.yaml"),
        Setting(2, "zero3.yaml", lora=True),
        Setting(2, "zero2.yaml"),
        Setting(2, "fsdp2.yaml"),
        Setting(2, shared=2),
    ],
    ids=lambda setting: setting.name,
)
def test_several_processes_generate_the_answers_of_one(setting: Setting, trained: Callable[[Setting], Path]) -> None:
    expected, run = trained(Setting(lora=setting.lora)), trained(setting)
    samples = read_samples(run)
    assert len({sample["answer"] for sample in samples}) > 15
    assert samples == read_samples(expected)
    assert [sample["answer"] is None for sample in samples if sample["kind"] == "prompts"][:3] == [False, False, True]
    for line, expected_line in zip(read_metrics(run), read_metrics(expected), strict=True):
        for name in {"loss", "eval_loss", "eval_rules_followed", "eval_turns_held"} & expected_line.keys():
            assert line[name] == pytest.approx(expected_line[name], rel=1e-5)


def ended_at(*arguments: str) -> int:
    """Train, and end the run in a batch of answers, counted on each process: `HOW,BATCH`.

    SIGKILL ends the last rank; `file` asks all ranks to stop.
    """
    *rest, moment = arguments
    how, _, batch = moment.partition(",")
    from train.loop import preemption
    from train.samples import generation

    preemption._POLL_SECONDS = 0.0  # these runs are over within a second
    generate_batch, batches = generation.generate_batch, 0
    output_dir = json.loads(Path(rest[1]).read_text(encoding="utf-8"))["output_dir"]

    def generate(*positional: Any, **options: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == int(batch) and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            if how == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            Path(output_dir, "stop").touch()
        return generate_batch(*positional, **options)

    generation.generate_batch = generate
    return sft(*rest)


def figures(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without timings."""
    clock = {*TIMING_METRICS, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in read_metrics(run)]


@pytest.mark.parametrize("setting", [Setting(), Setting(2, "zero3.yaml")], ids=lambda setting: setting.name)
@pytest.mark.parametrize("how", ["SIGKILL", "file"])
def test_a_run_that_ends_while_it_generates_goes_on_like_an_uninterrupted_one(
    how: str, setting: Setting, recipe_of: Callable[..., Path], trained: Callable[[Setting], Path], tmp_path: Path
) -> None:
    expected, recipe, run = trained(setting), recipe_of(setting, tmp_path), tmp_path / "run"
    # Batches of an evaluation: two long prompts, each alone; first turns of 9 conversations, then second turns of 2, by
    # threes or one for each process.
    per_evaluation = 2 + (3 + 1 if setting.processes == 1 else 2 + 1)
    for batch in (per_evaluation + 2, 2):  # in the evaluation of step 2, after that of step 0, and once more in it
        outcome = start(setting, recipe, tmp_path, f"{how},{batch}", job=ended_at)
        assert read_samples(run)
        assert not (run / "model.safetensors").exists()
        if how == "SIGKILL":
            assert -signal.SIGKILL in outcome.exit_codes
        else:
            outcome.succeeded()
            ended = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
            assert (ended["outcome"], ended["step"]) == ("preempted", 2)
    start(setting, recipe, tmp_path).succeeded()
    assert read_samples(run) == read_samples(expected)
    assert figures(run) == figures(expected)
    state, expected_state = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert [name for name in state if not torch.equal(state[name], expected_state[name])] == []
