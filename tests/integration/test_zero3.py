"""ZeRO-3 as the README launches it for Janus 7B, with a tiny model and two CPU processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import launch, sft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]


SFT = """
import sys
import deepspeed.ops
# Collectives in shared memory, which no GPU uses, would be compiled for two minutes at a machine's first run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from train.sft import main
sys.exit(main(sys.argv[1:]))
"""
"""train/sft.py without a slow step that only CPUs have."""


def accelerate_launch(folder: Path, recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run SFT on two CPU processes as accelerate_configs/zero3.yaml starts them on GPUs."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    (folder / "zero3.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": 2}))
    (folder / "sft.py").write_text(SFT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "zero3.yaml"]
    return subprocess.run(
        [*launcher, folder / "sft.py", "--recipe", recipe],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def sft_with_a_mask(*arguments: str) -> int:
    """Run train/sft.py with a mask of ones in each batch."""
    from trl import SFTTrainer

    prepare = SFTTrainer._prepare_inputs

    def with_a_mask(self: SFTTrainer, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = prepare(self, inputs)
        return inputs | {"attention_mask": inputs["input_ids"].new_ones(inputs["input_ids"].shape)}

    SFTTrainer._prepare_inputs = with_a_mask
    return sft(*arguments)


def test_full_fine_tuning_under_zero3_saves_a_complete_model(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    recipe = recipe_file(training={**training, "num_train_epochs": ..., "max_steps": 4})
    result = accelerate_launch(tmp_path, recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mismatch" not in result.stderr  # accelerate's warning about the accumulation that the Trainer does itself
    assert "2 processes" in result.stdout
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert all(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    assert result.stdout.count("step 1/") == 1
    assert result.stdout.count("packed documents are isolated: replacing one changes the loss of the next by 0 ") == 1


def test_an_adapter_with_selective_checkpointing_is_an_error_with_advice(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    recipe = recipe_file(adapter={"r": 2}, training=training)
    outcome = launch(2, "zero3.yaml", "--recipe", recipe, logs=tmp_path / "logs")
    assert outcome.exit_codes == [2, 2]
    assert "".join(outcome.output).count("error: training.gradient_checkpointing_kwargs: `selective: true` needs") == 1


def test_leaking_packs_stop_all_processes(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """With a mask of ones transformers ignores the documents of a pack. Both processes end, neither waits."""
    recipe = recipe_file(training={"per_device_train_batch_size": 1})
    outcome = launch(2, "zero3.yaml", "--recipe", recipe, logs=tmp_path / "logs", job=sft_with_a_mask)
    assert outcome.exit_codes == [2, 2]
    assert "".join(outcome.output).count("error: model.attention: sdpa lets packed documents see each other") == 1
    assert "step 1/" not in outcome.output[0]
