"""Uploads of checkpoints to the hub and to wandb: of complete ones, under their final name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from train.loop.checkpoint.manifest import COMPLETE
from train.loop.saving import SavingTrainer
from train.sft import main

SAVING = {"num_train_epochs": ..., "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("strategy", ["all_checkpoints", "end"])
def test_a_checkpoint_is_uploaded_once_it_is_complete(
    strategy: str, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is out of reach, so its client ends where it would begin."""
    uploaded = []

    def upload(self: Trainer, folder: str) -> None:
        uploaded.append((Path(folder), Path(folder, COMPLETE).is_file()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", upload)
    monkeypatch.setattr(SavingTrainer, "init_hf_repo", lambda *arguments, **keywords: None)
    assert main(["--recipe", str(recipe_file(training={**SAVING, "push_to_hub": True, "hub_strategy": strategy}))]) == 0
    steps = (1, 2) if strategy == "all_checkpoints" else ()
    assert uploaded == [(tmp_path / "run" / f"checkpoint-{step}", True) for step in steps]
    assert len(list((tmp_path / "run").glob(f"checkpoint-*/{COMPLETE}"))) == 2


def test_wandb_logs_a_checkpoint_once_it_is_complete(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    logged = []
    add_dir = wandb.Artifact.add_dir

    def add(self: Any, folder: str, *arguments: Any, **keywords: Any) -> Any:
        logged.append(folder)
        assert Path(folder, COMPLETE).is_file()
        return add_dir(self, folder, *arguments, **keywords)

    monkeypatch.setattr(wandb.Artifact, "add_dir", add)
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    tracking = {"wandb": {"project": "tests", "mode": "offline"}}
    assert main(["--recipe", str(recipe_file(training=SAVING, tracking=tracking))]) == 0
    checkpoints = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2)]
    assert [folder for folder in logged if folder in checkpoints] == checkpoints
