"""The plan's bytes of weights, gradients and optimizer against those that DeepSpeed holds, to the byte."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from train.model.memory import STRATEGIES, Numbers, states_of
from train.model.shape import shape_of
from train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}  # 3 x 64 elements: no padding by luck


@pytest.fixture
def odd_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with sizes that two GPUs can't share evenly, some of its parameters too large to persist."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model).to_dict()
    config |= {"hidden_size": 27, "intermediate_size": 53, "num_attention_heads": 3}
    config |= {"num_key_value_heads": 1, "mlp_bias": True, "attention_bias": True, "head_dim": 6}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("stage", "bf16", "adapter"), [(3, True, None), (3, False, None), (3, True, LORA), (2, True, None), (1, True, None)]
)
def test_weights_gradients_and_optimizer_are_those_of_deepspeed(
    stage: int,
    bf16: bool,
    adapter: dict[str, Any] | None,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    odd_model: Path,
) -> None:
    training = {"bf16": bf16, "max_steps": 1, "num_train_epochs": ..., "optim": "adamw_torch"}
    sections = {"model": {"name_or_path": str(odd_model)}, "training": training}
    recipe = recipe_file(**sections, **({"adapter": adapter} if adapter else {}))
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"zero{stage}.yaml").read_text())
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump({**config, "use_cpu": True, "num_processes": 2}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "launch.yaml"]
    result = subprocess.run(
        [*launch, "tests/integration/state_bytes.py", tmp_path, "--recipe", recipe],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shape = shape_of(load_recipe(recipe), AutoConfig.from_pretrained(odd_model))
    strategy = next(one for one in STRATEGIES if one.stage == stage and not one.offload)
    planned = states_of(shape, strategy, Numbers(2, "adamw_torch", bf16))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert planned.optimizer == found["masters"] + found["states"]
        if stage == 3:
            assert planned.parameters == found["partitions"] + found["persistent"]
            assert planned.gradients == found["gradients"]
        else:
            assert planned.parameters == found["weights"]
