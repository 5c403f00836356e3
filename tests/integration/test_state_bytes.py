"""The plan's bytes of weights, gradients and optimizer equal those that DeepSpeed holds."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from live_bytes import LiveBytes
from ranks import ROOT, launch
from state_bytes import train_and_measure
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from train.model.architecture import inspect_architecture
from train.preflight.plan.memory import DDP, STRATEGIES, StateSettings, count_state_bytes
from train.recipe import load_recipe

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}  # 3 x 64 elements: no padding by luck
SCALARS = 2_000
"""Bytes: norms, flags and counts of a step, and a norm's padding."""
BUCKET = 14_000
"""Elements of a bucket here: any parameter fits into one, and the model fills several, as real ones do."""


@pytest.fixture
def odd_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return the tiny model with sizes that two GPUs can't share evenly, and some parameters too large to persist."""
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model).to_dict()
    config |= {"hidden_size": 27, "intermediate_size": 53, "num_attention_heads": 3, "num_hidden_layers": 6}
    config |= {"num_key_value_heads": 1, "mlp_bias": True, "attention_bias": True, "head_dim": 6}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


@pytest.fixture
def measured(recipe_file: Callable[..., Path], tmp_path: Path, odd_model: Path) -> Callable[..., tuple]:
    """Return a function that trains with a shipped configuration: the plan, and the bytes that each of two ranks held."""

    def measure(strategy: str, bf16: bool, adapter: dict[str, Any] | None, optimizer: str) -> tuple:
        chosen = next(candidate for candidate in STRATEGIES if candidate.name == strategy)
        launched = yaml.safe_load((ROOT / chosen.config_file).read_text())
        deepspeed = json.loads((ROOT / launched["deepspeed_config"]["deepspeed_config_file"]).read_text())
        if chosen.stage < 3:
            deepspeed["zero_optimization"] |= {"reduce_bucket_size": BUCKET}
        if (
            chosen.offload
        ):  # torch's optimizer in place of DeepSpeed's own, which has to be compiled; memory of any kind
            del deepspeed["optimizer"]
            deepspeed["zero_force_ds_cpu_optimizer"] = False
            for part in "offload_optimizer", "offload_param":
                deepspeed["zero_optimization"][part]["pin_memory"] = False
        (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
        launched["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "deepspeed.json")
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(launched))
        training = {"bf16": bf16, "max_steps": 2, "num_train_epochs": ..., "optim": optimizer}
        training |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        sections = {"model": {"name_or_path": str(odd_model)}, "training": training}
        recipe = recipe_file(**sections, **({"adapter": adapter} if adapter else {}))
        launch(
            2,
            str(tmp_path / "launch.yaml"),
            tmp_path,
            "--recipe",
            recipe,
            job=train_and_measure,
            logs=tmp_path / "logs",
        ).succeeded()
        shape = inspect_architecture(load_recipe(recipe), AutoConfig.from_pretrained(odd_model))
        planned = count_state_bytes(shape, chosen, StateSettings(2, optimizer, bf16))
        return planned, [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return measure


CASES = [
    ("ZeRO-1", True, None, "adamw_torch_fused", "BF16_Optimizer"),
    ("ZeRO-1", True, LORA, "adamw_torch", "BF16_Optimizer"),
    ("ZeRO-1", False, None, "adamw_torch", "DeepSpeedZeroOptimizer"),
    ("ZeRO-2", True, None, "adamw_torch_fused", "DeepSpeedZeroOptimizer"),
    ("ZeRO-2", True, LORA, "adamw_torch", "DeepSpeedZeroOptimizer"),
    ("ZeRO-2", False, None, "adamw_torch", "DeepSpeedZeroOptimizer"),
    ("ZeRO-3", True, None, "adamw_torch_fused", "DeepSpeedZeroOptimizer_Stage3"),
    ("ZeRO-3", True, LORA, "adamw_torch", "DeepSpeedZeroOptimizer_Stage3"),
    ("ZeRO-3", False, None, "adamw_torch", "DeepSpeedZeroOptimizer_Stage3"),
    ("ZeRO-3 offload", True, None, "adamw_torch", "DeepSpeedZeroOptimizer_Stage3"),
    ("ZeRO-3 offload", False, LORA, "adamw_torch", "DeepSpeedZeroOptimizer_Stage3"),
]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("strategy", "bf16", "adapter", "optimizer", "kind"),
    CASES,
    ids=["-".join([case[0], "bf16" if case[1] else "fp32", "lora" if case[2] else "full"]) for case in CASES],
)
def test_weights_gradients_optimizer_and_step_are_those_of_deepspeed(
    strategy: str, bf16: bool, adapter: dict[str, Any] | None, optimizer: str, kind: str, measured: Callable[..., tuple]
) -> None:
    planned, ranks = measured(strategy, bf16, adapter, optimizer)
    assert [parts["kind"] for parts in ranks] == [kind, kind]
    for parts in ranks:
        states, weights = parts["masters"] + parts["states"], parts.get("weights")
        if "offload" in strategy:
            persistent_parts = planned.parameters - parts["persistent"]  # they lie with all partitions, on the host
            assert planned.host == parts["partitions"] - persistent_parts + parts["gradients"] + states
            continue
        assert planned.optimizer == states
        assert planned.parameters == (parts["partitions"] + parts["persistent"] if weights is None else weights)
    if "offload" in strategy:
        assert (planned.gradients, planned.optimizer, planned.step) == (0, 0, 0)
        return
    fullest = max(parts["gradients"] for parts in ranks)
    if strategy == "ZeRO-1" and not bf16:  # the first bucket is full when the copies of the rank's own are made
        assert planned.gradients - 2 * 4 * BUCKET <= fullest <= planned.gradients
        fullest = planned.gradients
    assert planned.gradients == fullest
    assert planned.step == pytest.approx(max(0, *(parts["grew"] - fullest for parts in ranks)), abs=SCALARS)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_without_deepspeed(
    optimizer: str, recipe_file: Callable[..., Path], odd_model: Path, tmp_path: Path
) -> None:
    """torch's AdamW on all parameters of a group at once, as on a GPU."""
    shape = inspect_architecture(
        load_recipe(recipe_file(model={"name_or_path": str(odd_model)})), LlamaConfig.from_pretrained(odd_model)
    )
    groups = [
        [
            torch.randn(parameter.shape, requires_grad=True)
            for parameter in shape.parameters
            if parameter.decayed is decayed
        ]
        for decayed in (True, False)
    ]
    for group in groups:
        for parameter in group:
            parameter.grad = torch.ones_like(parameter)
    fused = optimizer == "adamw_torch_fused"
    adam = torch.optim.AdamW([{"params": group} for group in groups], fused=fused, foreach=not fused)
    adam.step()
    with LiveBytes() as live:
        adam.step()
    assert count_state_bytes(shape, DDP, StateSettings(2, optimizer, True)).step == pytest.approx(
        live.peak, abs=SCALARS
    )
