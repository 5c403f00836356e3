"""training.torch_compile: layers are compiled once, and a run gives the losses and files of an uncompiled one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from train.sft import main

COMPILED = ["training.torch_compile=true", "training.torch_compile_backend=eager"]
VARYING = ("second", "mfu", "memory", "runtime")
"""Parts of the names of metrics that differ between runs of the same recipe."""


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not any(word in name for word in VARYING)} for line in lines
    ]


@pytest.fixture
def train(recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that trains a recipe and returns the run's folder."""
    for name in ("DYNAMIC", "REGIONAL_COMPILATION", "FULLGRAPH"):  # as `accelerate launch` does
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_USE_{name}", "False")

    def run(name: str, *overrides: str, **sections: dict) -> Path:
        torch._dynamo.reset()
        counters.clear()
        recipe = recipe_file(output_dir=str(tmp_path / name), **sections)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            assert main(["--recipe", str(recipe), *overrides]) == 0
        return tmp_path / name

    return run


def assert_same_weights(file: Path, other: Path) -> None:
    weights, others = load_file(file), load_file(other)
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, others[key], rtol=1e-3, atol=1e-5)


def test_a_compiled_run_is_that_of_an_uncompiled_one(
    train: Callable[..., Path], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, metrics, evaluations, files and weights; from the beginning and resumed."""
    every_2 = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    sections = {
        "data": {"validation": [{"path": str(rows_file)}], "max_length": 300, "overlong": "drop"},
        "training": {"num_train_epochs": ..., "max_steps": 4, **every_2},
    }
    plain = train("plain", **sections)
    assert not counters["stats"]
    compiled = train("compiled", *COMPILED, **sections)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    shutil.copytree(compiled / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    capsys.readouterr()
    resumed = train("resumed", *COMPILED, **sections)
    assert "resuming from" in capsys.readouterr().out

    expected = metrics(plain)
    assert {"loss", "num_tokens", "entropy", "eval_loss", "eval_system_gain"} <= {
        key for line in expected for key in line
    }
    for run in compiled, resumed:
        for line, right in zip(metrics(run), expected, strict=True):
            assert line == pytest.approx(right, rel=1e-4, abs=1e-5), line["step"]
        assert {path.name for path in run.iterdir()} == {path.name for path in plain.iterdir()}
        for folder in "", "checkpoint-4":
            assert_same_weights(run / folder / "model.safetensors", plain / folder / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(compiled)


def test_an_adapter_is_compiled_with_its_layers(train: Callable[..., Path]) -> None:
    """With checkpointing; the one break is in the embedding, by PreTrainedModel.enable_input_require_grads."""
    sections = {
        "training": {"num_train_epochs": ..., "max_steps": 2, "gradient_checkpointing": True},
        "adapter": {"r": 4},
    }
    plain = train("plain", **sections)
    compiled = train("compiled", *COMPILED, **sections)
    assert counters["stats"]["unique_graphs"] > 0
    assert all("requires_grad_()" in reason for reason in counters["graph_break"])
    for line, right in zip(metrics(compiled), metrics(plain), strict=True):
        assert line == pytest.approx(right, rel=1e-4, abs=1e-5)
    assert_same_weights(compiled / "adapter_model.safetensors", plain / "adapter_model.safetensors")
