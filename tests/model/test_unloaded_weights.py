"""Weights that are not part of the model of config.json: its layers and biases are errors, others are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTJConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from train.errors import UserError
from train.model.load import check_model, load_model, load_saved
from train.model.unloaded_weights import left_out, read_weight_names
from train.recipe import load_recipe

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
LAYERS = {**SIZES, "intermediate_size": 24, "num_hidden_layers": 2}
GPT = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 16}


def save(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def add(folder: Path, **weights: torch.Tensor) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, **weights}, folder / "model.safetensors", metadata={"format": "pt"})


def says(folder: Path) -> tuple[str | None, str | None]:
    """Return the errors by the names in the files alone, and by those that transformers did not load."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return left_out(bare, config, read_weight_names(folder)), left_out(loaded, config, report["unexpected_keys"])


SHORTENED: dict[str, tuple[PreTrainedConfig, dict[str, Any], str]] = {
    "Qwen3": (Qwen3Config(**LAYERS), {"num_hidden_layers": 1, "layer_types": None}, "model.layers.1."),
    "GPT-2": (GPT2Config(**GPT), {"n_layer": 1}, "transformer.h.1."),
    "experts that are stacked as they are loaded": (
        MixtralConfig(**LAYERS, num_local_experts=2),
        {"num_hidden_layers": 1},
        "model.layers.1.",
    ),
    "biases": (Qwen2Config(**LAYERS), {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "k_proj.bias"),
}


@pytest.mark.parametrize("kind", SHORTENED)
def test_layers_and_biases_that_config_json_leaves_out_are_errors(kind: str, tmp_path: Path) -> None:
    config, settings, name = SHORTENED[kind]
    folder = save(config, tmp_path / "model")
    assert says(folder) == (None, None)
    change(folder, **settings)
    for sentence in says(folder):
        assert sentence is not None
        assert name in sentence
        assert "its config.json leaves out" in sentence


def test_a_layer_in_another_shard_and_names_without_their_prefix_are_found(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**LAYERS))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert sorted(read_weight_names(tmp_path / "sharded")) == sorted(model.state_dict())
    change(tmp_path / "sharded", num_hidden_layers=1, layer_types=None)
    assert None not in says(tmp_path / "sharded")
    with torch.device("meta"):
        short = AutoModelForCausalLM.from_config(Qwen3Config(**LAYERS | {"num_hidden_layers": 1}))
    assert left_out(short, short.config, ["layers.0.mlp.up_proj.weight", "norm.weight"]) is None
    assert "layers.1.mlp" in str(left_out(short, short.config, ["layers.1.mlp.up_proj.weight"]))


def test_intentionally_ignored_weights_are_no_error(tmp_path: Path) -> None:
    """Masks of old files, buffers, heads for multi-token prediction, value heads, scales, zero biases of GPTQ."""
    cases: list[tuple[PreTrainedConfig, list[str]]] = [
        (GPT2Config(**GPT), ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        (GPTJConfig(**GPT, rotary_dim=4), ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        (
            Qwen3Config(**LAYERS),
            [
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                "model.mtp.layers.0.mlp.up_proj.weight",
                "mtp.layers.0.mlp.up_proj.weight",
                "v_head.summary.weight",
                "model.layers.0.self_attn.k_scale",
                "model.layers.0.mlp.up_proj.weight_scale",
            ],
        ),
        (
            DeepseekV3Config(
                **{**LAYERS, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8},
                **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 2},
                num_nextn_predict_layers=1,
            ),
            ["model.layers.2.mlp.up_proj.weight", "model.layers.61.input_layernorm.weight"],
        ),
    ]
    for config, names in cases:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert left_out(model, config, names) is None
    quantized = Qwen3Config(**LAYERS, quantization_config={"quant_method": "gptq", "bits": 4})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**LAYERS))
    assert left_out(model, quantized, ["model.layers.0.mlp.up_proj.bias"]) is None
    assert left_out(model, model.config, ["model.layers.0.mlp.up_proj.bias"]) is not None


def test_a_model_that_would_lose_a_layer_is_an_error_before_its_weights_are_loaded(
    tiny_model: Path, tmp_path: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    change(base, num_hidden_layers=1)
    path = recipe_file(model={"name_or_path": str(base)})
    error = refused("--recipe", path, "--check")
    assert error.startswith(f"model.name_or_path: {base} can't be loaded: its files hold weights of the model that its")
    assert "model.layers.1.input_layernorm.weight and 8 more" in error
    for load in lambda: load_model(load_recipe(path)), lambda: load_saved(str(base)):
        with pytest.raises(UserError, match=r"leaves out: model\.layers\.1\.input_layernorm\.weight and 8 more"):
            load()


def test_other_unloaded_weights_are_named(
    tiny_model: Path, tmp_path: Path, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    add(base, **{"v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)})
    recipe = load_recipe(recipe_file(model={"name_or_path": str(base)}))
    check_model(recipe)
    load_model(recipe)
    line = "weights that are not part of LlamaForCausalLM are neither loaded nor saved: v_head.summary.bias and 1 more"
    assert line in capsys.readouterr().out
    load_model(load_recipe(recipe_file()))
    assert "neither loaded nor saved" not in capsys.readouterr().out
