"""Which checkpoints a run goes on from, and what is said of one that it can't go on from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.sft import main

SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 2}


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    """Its weights would be trained on from a fresh optimizer: another run under the same name."""
    recipe = recipe_file(training={**SAVING, "save_only_model": True})
    assert main(["--recipe", str(recipe)]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    for resume in "auto", str(checkpoint):
        error = refused("--recipe", recipe, "--resume", resume)
        assert f"{checkpoint} holds no optimizer" in error
        assert "training.save_only_model" in error
    error = refused("--recipe", recipe_file(training=SAVING))
    assert "holds no optimizer" in error  # not merely another recipe


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "optimizer.pt", "COMPLETE.json"])
def test_a_damaged_checkpoint_is_named_with_its_file(
    name: str, recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe = recipe_file(training=SAVING)
    assert main(["--recipe", str(recipe)]) == 0
    file = tmp_path / "run" / "checkpoint-2" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    error = refused("--recipe", recipe)
    assert f"{file} is damaged" in error
    assert "--resume never" in error
    file.write_bytes(whole)
    assert main(["--recipe", str(recipe)]) == 0


def test_half_a_line_of_metrics_after_a_crash_is_passed_over(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(recipe_file(training={**SAVING, "max_steps": 4}))
    assert main(["--recipe", recipe]) == 0
    run = tmp_path / "run"
    (run / "checkpoint-4" / "COMPLETE.json").unlink()
    metrics = run / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    metrics.write_text(metrics.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    assert main(["--recipe", recipe]) == 0
    after = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in after] == [(line["step"], line["loss"]) for line in before]
