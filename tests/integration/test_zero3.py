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


PLAIN = """
import sys
import deepspeed.ops
# Collectives in shared memory, which no GPU uses, would be compiled for two minutes at a machine's first run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from train.sft import main
"""
"""The door, but for what takes so long on a CPU alone."""
SFT = f"{PLAIN}\nsys.exit(main(sys.argv[1:]))"
LEAKING = f"""{PLAIN}
import train.loop.trainer as loop
collate = loop.SFTTrainer._prepare_inputs
def with_a_mask(self, inputs):
    inputs = collate(self, inputs)
    return inputs | {{"attention_mask": inputs["input_ids"].new_ones(inputs["input_ids"].shape)}}
loop.SFTTrainer._prepare_inputs = with_a_mask
sys.exit(main(sys.argv[1:]))
"""


def launch(folder: Path, recipe: Path, program: str = SFT) -> subprocess.CompletedProcess[str]:
    """Two processes on a CPU, as accelerate_configs/zero3.yaml starts them on GPUs."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    (folder / "zero3.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": 2}))
    (folder / "sft.py").write_text(program)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "zero3.yaml"]
    return subprocess.run(
        [*launcher, folder / "sft.py", "--recipe", recipe],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_full_fine_tuning_under_zero3_saves_a_whole_model(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    recipe = recipe_file(training={**training, "num_train_epochs": ..., "max_steps": 4})
    result = launch(tmp_path, recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mismatch" not in result.stderr  # accelerate's word on the accumulation that the Trainer does itself
    assert "2 processes" in result.stdout
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert all(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    assert result.stdout.count("step 1/") == 1
    assert result.stdout.count("packed documents are apart: replacing one changes the next one's loss by 0 ") == 1


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_an_adapter_with_selective_checkpointing_is_an_error_that_says_what_to_write(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    result = launch(tmp_path, recipe_file(adapter={"r": 2}, training=training))
    assert result.returncode != 0
    assert result.stderr.count("error: training.gradient_checkpointing_kwargs: `selective: true` needs") == 1


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_packed_documents_that_see_each_other_stop_all_processes(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A mask of ones makes transformers overlook the documents of a pack. Both processes end, neither waits."""
    result = launch(tmp_path, recipe_file(training={"per_device_train_batch_size": 1}), LEAKING)
    assert result.returncode != 0
    assert result.stderr.count("error: model.attention: sdpa lets packed documents see each other") == 1
    assert "step 1/" not in result.stdout
