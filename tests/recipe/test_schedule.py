"""The schedule of a run equals that of transformers' Trainer and accelerate's data loader."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTConfig

from train.recipe.schedule import compute_schedule
from train.sft import main

LENGTHS: list[dict[str, Any]] = [{"num_train_epochs": epochs} for epochs in (1, 2, 0.3, 2.5)]
LENGTHS += [{"max_steps": steps} for steps in (1, 7, 1_000)]
WARM_UPS = [0, 3, 0.1, 0.999]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_those_of_the_trainer(processes: int, drop_last: bool, tmp_path: Path) -> None:
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    counts: set[int] = set()
    for sequences, batch, accumulation in itertools.product([1, 5, 24, 101], [1, 3, 8], [1, 2, 5]):
        if drop_last and sequences < batch * processes:
            continue  # no complete batch: refused elsewhere
        loader = DataLoader(range(sequences), batch_size=batch, drop_last=drop_last)  # type: ignore[arg-type]
        # of the first of several processes, without starting them
        loader = prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)
        for length, warm_up in itertools.product(LENGTHS, WARM_UPS):
            training = {
                **{"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
                **{"dataloader_drop_last": drop_last, "warmup_steps": warm_up, **length},
            }
            for key, value in {"max_steps": -1, "num_train_epochs": 3, **training}.items():
                setattr(arguments, key, value)
            per_step = batch * accumulation * processes
            trainer: Any = SimpleNamespace(
                get_total_train_batch_size=lambda _, per_step=per_step: per_step,
                get_sp_size=lambda: 1,
                num_examples=lambda loader: len(loader.dataset),
            )
            _, an_epoch, examples, _, total, _, steps = Trainer.set_initial_training_values(trainer, arguments, loader)
            schedule = compute_schedule(training, sequences, 10.0, processes)
            assert (schedule.steps, schedule.steps_per_epoch) == (steps, an_epoch), training
            assert schedule.sequences_per_step == min(total, examples)
            assert schedule.tokens_per_step == 10.0 * min(total, examples)
            assert schedule.warmup_steps == arguments.get_warmup_steps(steps)
            counts.add(steps)
    assert len(counts) > 10


def test_the_check_reports_the_steps_of_the_training(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"gradient_accumulation_steps": 2, "num_train_epochs": 1.5, "warmup_steps": 0.4}
    recipe = str(recipe_file(data={"max_length": 300}, training=training))
    report = tmp_path / "report.json"
    assert main(["--recipe", recipe, "--check", "--json", str(report)]) == 0
    schedule = json.loads(report.read_text())["schedule"]
    page = capsys.readouterr().out
    assert main(["--recipe", recipe]) == 0
    screen = capsys.readouterr().out
    assert f"step {schedule['steps']}/{schedule['steps']} " in screen
    sequences, tokens = schedule["sequences_per_step"], f"about {schedule['tokens_per_step']:,.0f} tokens"
    assert f"{sequences} sequences per step, {tokens}" in page
    assert f"{schedule['steps']} steps of {sequences} sequences, {tokens}; 1 process" in screen
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [step["learning_rate"] for step in logged if "learning_rate" in step]
    assert len(rates) == schedule["steps"]
    assert rates.index(max(rates)) == schedule["warmup_steps"]  # the first step has rate 0
