"""Metrics log: metrics.jsonl, the printed lines, report.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from train import progress
from train.recipe import load_recipe
from train.sft import main


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_report_shows_loss_and_samples_of_the_model_that_was_saved(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The first step is warm-up and changes nothing; the learning rate of the second makes the model worse."""
    training = {
        "learning_rate": 1.0,
        "warmup_steps": 1,
        "num_train_epochs": ...,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    evaluation = {"turns": {"conversations": 1, "turns": 1, "push_back_at": None}, "max_new_tokens": 2}
    recipe = str(recipe_file(data={"validation": 0.25, "packing": False}, training=training, evaluation=evaluation))
    for _ in range(2):  # a second time there is nothing left to train, and the report is the same
        assert main(["--recipe", recipe]) == 0
        losses = {line["step"]: line["eval_loss"] for line in metrics_of(tmp_path / "run") if "eval_loss" in line}
        best = min(losses, key=lambda step: losses[step])
        assert best < 2
        report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
        assert f"| validation loss of the saved model (step {best}) | {losses[best]:.4f} |" in report
        assert "at the end" not in report
        assert f"## Samples of step {best}\n" in report
    assert sum("loaded_step" in line for line in metrics_of(tmp_path / "run")) == 1


def test_the_token_count_continues_after_a_resume(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    training = {
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,  # the checkpoint lies between two lines
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "num_train_epochs": ...,
        "max_steps": 6,
    }
    recipe = str(recipe_file(data={"packing": False}, training=training))
    assert main(["--recipe", recipe]) == 0
    tokens = [line["num_tokens"] for line in metrics_of(tmp_path / "run")]
    assert tokens == sorted(set(tokens))
    (tmp_path / "run" / "checkpoint-6" / "COMPLETE.json").unlink()
    assert main(["--recipe", recipe]) == 0
    assert [line["num_tokens"] for line in metrics_of(tmp_path / "run")] == tokens


def test_numbers_of_the_report_are_short(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["--recipe", str(recipe_file())]) == 0
    table = (tmp_path / "run" / "report.md").read_text(encoding="utf-8").partition("| | |")[2]
    assert re.search(r"first and last logged \| \d+\.\d{4} -> \d+\.\d{4} \|", table)
    assert re.findall(r"\d\.\d{5,}", table) == []


def test_steps_show_between_rare_logging_steps(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    training = {"logging_steps": 3, "num_train_epochs": ..., "max_steps": 3}
    assert main(["--recipe", str(recipe_file(training=training))]) == 0
    shown = capsys.readouterr().out
    assert "training: 1 of 3 steps (33%)" in shown
    assert "training: 2 of 3 steps (67%)" in shown


@pytest.mark.parametrize("adapter", [None, {"r": 2}], ids=["full", "lora"])
def test_the_model_card_is_the_recipe_and_no_pickle_is_left(
    recipe_file: Callable[..., Path], tmp_path: Path, adapter: dict | None
) -> None:
    training = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": ..., "max_steps": 1}
    path = recipe_file(training=training, adapter=adapter)
    assert main(["--recipe", str(path)]) == 0
    run = tmp_path / "run"
    card = ModelCard.load(run / "README.md")
    assert card.data.library_name == ("transformers" if adapter is None else "peft")
    assert card.data.base_model is None  # a folder of this machine's, no id on the hub
    text = card.text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "card.yaml") == load_recipe(path)
    assert list(run.rglob("*.bin")) == []
