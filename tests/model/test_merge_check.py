"""Merges are checked by weights, in which an adapter of few steps is visible: any wrong weight is an error."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from train.errors import UserError
from train.model.merge import find_tied_embeddings, merge_adapter
from train.model.merge_check import MergeCheck, check_merge

Weights = dict[str, torch.Tensor]
SQUARE = "model.layers.0.self_attn.q_proj.weight"
FEW_STEPS = 1e-5
"""Size of the updates, of weights of about 0.2, as after some steps of training."""


def make_adapter(base: Path, folder: Path, size: float, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 16, **settings}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_embedding_A" in name):
            parameter.data = size * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save the tiny model in each dtype."""
    folder = tmp_path_factory.mktemp("bases")
    for dtype in ("bfloat16", "float16"):
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype)).save_pretrained(folder / dtype)
    return {"float32": tiny_model, "bfloat16": folder / "bfloat16", "float16": folder / "float16"}


def check(base: Path, adapter: Path, merged: Path) -> MergeCheck:
    return check_merge(base, adapter, merged, find_tied_embeddings(base))


def base_instead(before: Weights, after: Weights) -> Weights:
    return before


def half_of_the_layers(before: Weights, after: Weights) -> Weights:
    return {**after, **{name: value for name, value in before.items() if ".layers.1." in name}}


def wrong_scale(before: Weights, after: Weights) -> Weights:
    return {
        name: (before[name] + 1.5 * (value.float() - before[name])).to(value.dtype) for name, value in after.items()
    }


def turned(before: Weights, after: Weights) -> Weights:
    return {**after, SQUARE: (before[SQUARE] + (after[SQUARE].float() - before[SQUARE]).T).to(after[SQUARE].dtype)}


def another_weight_touched(before: Weights, after: Weights) -> Weights:
    return {**after, "model.norm.weight": after["model.norm.weight"] * 1.01}


def one_number_off(before: Weights, after: Weights) -> Weights:
    value = after[SQUARE].clone()
    value[3, 5] += 0.01
    return {**after, SQUARE: value}


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alphas": {"alpha_pattern": {"q_proj": 64}},
}
WRONG = [base_instead, half_of_the_layers, wrong_scale, turned, another_weight_touched, one_number_off]


@pytest.mark.parametrize(
    ("kind", "dtype", "size"),
    [*((kind, "float32", FEW_STEPS) for kind in KINDS), ("lora", "bfloat16", 0.02), ("dora", "float16", 0.003)],
)
def test_a_right_merge_passes_and_a_wrong_one_is_refused(
    kind: str, dtype: str, size: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[dtype]
    adapter = make_adapter(base, tmp_path / "adapter", size, **KINDS[kind])
    merge_adapter(base, adapter, tmp_path / "merged")
    result = check(base, adapter, tmp_path / "merged")
    assert result.changed == 4
    assert result.surviving > 0.5
    path = tmp_path / "merged" / "model.safetensors"
    before, after = load_file(base / "model.safetensors"), load_file(path)
    for wrong in WRONG:
        save_file({name: value.contiguous() for name, value in wrong(before, after).items()}, path)
        with pytest.raises(UserError, match="the merged weight is not"):
            check(base, adapter, tmp_path / "merged")
    save_file({name: value for name, value in after.items() if name != SQUARE}, path)
    with pytest.raises(UserError, match=f"{SQUARE} and 0 more are missing"):
        check(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_share_that_survives_rounding_is_that_of_a_plain_loop(
    dtype: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[dtype]
    adapter = make_adapter(base, tmp_path / "adapter", 1e-4 if dtype == "bfloat16" else 2e-5, target_modules=["q_proj"])
    merge_adapter(base, adapter, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    delta = load_file(adapter / "adapter_model.safetensors")
    expected = actual = 0.0
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (delta[f"base_model.model.{name}.lora_{side}.weight"].tolist() for side in "AB")
        old, new = (weights[f"{name}.weight"].double().tolist() for weights in (before, after))
        for row in range(len(old)):
            for column in range(len(old[0])):
                update = 4 * sum(b[row][rank] * a[rank][column] for rank in range(4))
                expected += update * update
                actual += update * (new[row][column] - old[row][column])
    share = check(base, adapter, tmp_path / "merged").surviving
    assert 0.01 < share < 0.9
    assert share == pytest.approx(actual / expected, rel=1e-4)


def test_transposed_weights_of_gpt_2(tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    for use_dora in (False, True):
        adapter = make_adapter(base, tmp_path / f"adapter-{use_dora}", 1e-3, **settings, use_dora=use_dora)
        merged = tmp_path / f"merged-{use_dora}"
        merge_adapter(base, adapter, merged)
        assert check(base, adapter, merged).changed == 3
        weights = load_file(merged / "model.safetensors")
        before = load_file(base / "model.safetensors")
        name = next(name for name in weights if "attn.c_proj.weight" in name)  # square
        weights[name] = (before[name] + (weights[name] - before[name]).T).contiguous()
        save_file(weights, merged / "model.safetensors")
        with pytest.raises(UserError, match="is not base plus update"):
            check(base, adapter, merged)


def test_other_weight_files_in_the_folder_are_ignored(bases: dict[str, Path], tmp_path: Path) -> None:
    """Mistral publishes consolidated.safetensors, which transformers doesn't load."""
    base = tmp_path / "base"
    shutil.copytree(bases["float32"], base)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    adapter = make_adapter(base, tmp_path / "adapter", FEW_STEPS)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert check(base, adapter, tmp_path / "merged").changed == 4


@pytest.mark.parametrize("start", ["pissa_niter_2", "olora"])
def test_an_adapter_whose_initialization_changed_the_base_is_refused(
    start: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases["float32"], tmp_path / "adapter", FEW_STEPS, init_lora_weights=start)
    with pytest.raises(UserError, match=rf"init_lora_weights \({start}\) changed the base's weights"):
        merge_adapter(bases["float32"], adapter, tmp_path / "merged")


def test_unmergeable_parts_of_an_adapter_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    """For example trained biases."""
    base = bases["float32"]
    adapter = make_adapter(base, tmp_path / "adapter", FEW_STEPS)
    merge_adapter(base, adapter, tmp_path / "merged")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.self_attn.o_proj.bias"] = torch.ones(64)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"o_proj\.bias and 0 more are missing"):
        check(base, adapter, tmp_path / "merged")
