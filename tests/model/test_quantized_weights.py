"""Bases whose weights are saved quantized: trained under LoRA, unpacked, or refused with one error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from train.errors import UserError
from train.model.load import check_model, load_model
from train.model.quantized_weights import check_quantized, with_saved_quantization
from train.recipe import Recipe, load_recipe
from train.sft import main

OTHERS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "optimum"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "gptqmodel"),
    "fp8 of compressed-tensors": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
    "aqlm": ({"quant_method": "aqlm"}, "aqlm"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
    "a method that trains no adapter": ({"quant_method": "bitnet"}, "no adapter can be trained"),
    "a method unknown here": ({"quant_method": "exl2", "bits": 4}, "exl2"),
    "no method": ({"bits": 4, "group_size": 64}, "no method named"),
    "settings that cannot be read": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
}  # fmt: skip


def quantized(settings: dict) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_hidden_layers=1, quantization_config=settings)


@pytest.fixture
def recipe(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    return lambda **sections: load_recipe(recipe_file(**sections))


@pytest.fixture(scope="module")
def in_4_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bnb4"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)
    for path in tiny_model.glob("token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_that_cannot_be_trained_here_are_refused(kind: str, recipe: Callable[..., Recipe]) -> None:
    settings, words = OTHERS[kind]
    for adapter in ({"r": 4}, None):
        with pytest.raises(UserError, match=r"^model.name_or_path: the weights of .* are quantized") as refused:
            check_quantized(recipe(adapter=adapter), quantized(settings))
        assert words in str(refused.value)
        assert re.search(r"name the model that it was quantized from\.$", str(refused.value))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_takes_an_adapter_and_no_full_training(bits: int, recipe: Callable[..., Recipe]) -> None:
    settings = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    check_quantized(recipe(adapter={"r": 4}), quantized(settings))
    with pytest.raises(UserError, match=r"can't be trained in full. Add `adapter: .r: 16.`"):
        check_quantized(recipe(), quantized(settings))


def test_a_base_in_4_bits_trains_as_under_the_quantization_that_the_recipe_writes_out(
    in_4_bits: Path, recipe_file: Callable[..., Path], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"model": {"name_or_path": str(in_4_bits)}, "training": {"num_train_epochs": ..., "max_steps": 2}}
    steps = []
    for quantization in (None, {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": False}):
        recipe = recipe_file(adapter={"r": 4}, quantization=quantization, **sections)
        assert main(["--recipe", str(recipe), "--resume", "never"]) == 0
        shown = capsys.readouterr().out
        assert "LoRA r=4 on 4-bit nf4" in shown
        steps.append(re.findall(r"^step .* loss (\S+) .* grad_norm (\S+)", shown, re.MULTILINE))
    assert len(steps[0]) == 2
    assert steps[0] == steps[1]
    for check in ([], ["--check"]):
        assert "can't be trained in full" in refused("--recipe", recipe_file(**sections), *check)
    fp4 = recipe_file(adapter={"r": 4}, quantization={"bnb_4bit_quant_type": "fp4"}, **sections)
    assert refused("--recipe", fp4, "--check").startswith("quantization.bnb_4bit_quant_type: ")


def test_reports_read_the_saved_quantization(in_4_bits: Path, recipe: Callable[..., Recipe]) -> None:
    config = AutoModelForCausalLM.from_pretrained(in_4_bits).config
    shown = with_saved_quantization(recipe(adapter={"r": 4}), config).quantization
    assert shown is not None
    assert shown.model_dump() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }


def test_fp8_is_unpacked_to_the_weights_that_its_scales_stand_for(
    tiny_model: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    folder, block = tmp_path / "fp8", 32
    shutil.copytree(tiny_model, folder)
    expected, stored = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            expected[name] = stored[name] = weight
            continue
        rows, columns = weight.shape
        scales = torch.rand(rows // block, columns // block) + 0.5
        packed = weight.to(torch.float8_e4m3fn)
        stored |= {name: packed, name.replace("weight", "weight_scale_inv"): scales}
        expected[name] = packed.float().clone()
        for row in range(rows):
            for column in range(columns):
                expected[name][row, column] *= scales[row // block, column // block]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    read = recipe(model={"name_or_path": str(folder)})
    (note,) = check_model(read).notes
    assert note == "The weights are quantized (fp8) and are unpacked to float32 to be trained"
    model = load_model(read)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
        assert weight.requires_grad
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_weights_of_another_model_are_never_initialized_at_random(
    tiny_model: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    read = recipe(model={"name_or_path": str(folder)})
    for changed, words in (
        (weights, "its files lack weights that LlamaForCausalLM has: model.norm.weight"),
        (
            {**weights, "model.norm.weight": norm[:8]},
            "model.norm.weight is 8 in its files, and its config.json asks for 64",
        ),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="can't be loaded: ") as refused:
            load_model(read)
        assert words in str(refused.value)
