"""The launch that the README names for Janus 7B, with a tiny model and two processes on a CPU."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_full_fine_tuning_under_zero3_saves_a_whole_model(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    recipe = recipe_file(training={"per_device_train_batch_size": 1, "gradient_checkpointing": True})
    config = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": 2}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "zero3.yaml"]
    result = subprocess.run(
        [*launch, "train/sft.py", "--recipe", recipe],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert all(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    assert result.stdout.count("step 1/") == 1
