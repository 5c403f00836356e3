"""Multimodal models trained on text: idle parameters are found, frozen and not adapted by LoRA."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3Config,
    LlavaConfig,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2AudioConfig,
    Qwen3_5Config,
)

from train.model.adapters import check_adapter, lora_config
from train.model.architecture import inspect_architecture
from train.model.text_part import (
    auto_model_class,
    build_meta_model,
    describe_idle,
    find_idle_modules,
    find_idle_parameters,
    freeze,
)
from train.recipe import AdapterSection, ModelSection, load_recipe

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
GEMMA3 = Gemma3Config(
    text_config=TEXT, vision_config={**VISION, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=5,
    boi_token_index=6, eoi_token_index=7,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MODELS: dict[str, tuple[PreTrainedConfig, str, list[str]]] = {
    "Gemma 3": (
        GEMMA3, "Gemma3ForConditionalGeneration", ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "LLaVA": (
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT}, image_token_index=5,
            vision_config={"model_type": "clip_vision_model", **VISION, "patch_size": 14, "projection_dim": 16},
        ),
        "LlavaForConditionalGeneration", ["model.vision_tower", "model.multi_modal_projector"],
    ),
    "Qwen2.5-VL": (
        Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": ROPE, "rope_parameters": ROPE}, image_token_id=5, video_token_id=6,
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                           "fullatt_block_indexes": [0]},
        ),
        "Qwen2_5_VLForConditionalGeneration", ["model.visual"],
    ),
    "Qwen2-Audio, a tower that listens": (
        Qwen2AudioConfig(
            text_config={"model_type": "qwen2", **TEXT}, audio_token_index=5,
            audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                          "num_mel_bins": 8, "max_source_positions": 16},
        ),
        "Qwen2AudioForConditionalGeneration", ["model.audio_tower", "model.multi_modal_projector"],
    ),
    "Llama 3.2 Vision, with layers for images amid those for text": (
        MllamaConfig(
            text_config={**TEXT, "cross_attention_layers": [1]}, image_token_index=5,
            vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
                           "attention_heads": 2, "vision_output_dim": 32, "intermediate_layers_indices": [0],
                           "image_size": 28, "patch_size": 14},
        ),
        "MllamaForConditionalGeneration",
        ["model.vision_model", "model.language_model.layers.1", "model.multi_modal_projector"],
    ),
}  # fmt: skip


def of(name: str) -> PreTrainedConfig:
    config, saved_as, _ = MODELS[name]
    config.architectures = [saved_as]
    return config


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return auto_model_class(of(name)).from_config(of(name), attn_implementation="eager").train()


def without_gradient(model: torch.nn.Module) -> set[str]:
    """Return the parameters without a gradient in a real forward and backward pass on text."""
    ids = torch.randint(8, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name for name, weight in model.named_parameters() if weight.grad is None}


@pytest.mark.parametrize("name", MODELS)
def test_idle_parameters_are_those_without_a_gradient(name: str) -> None:
    model = model_of(name)
    bare = build_meta_model(of(name), ModelSection(name_or_path="x", dtype="float32"))
    assert type(bare).__name__ == type(model).__name__ == MODELS[name][1]
    idle = find_idle_parameters(bare)
    assert idle == without_gradient(model)
    assert sorted(find_idle_modules(model, idle)) == sorted(MODELS[name][2])


@pytest.mark.parametrize(
    ("name", "targets"), [("Gemma 3", "all-linear"), ("Qwen2-Audio, a tower that listens", ("q_proj", "k_proj"))]
)
def test_lora_does_not_adapt_idle_modules(name: str, targets: str | tuple[str, ...]) -> None:
    from peft import get_peft_model

    model = model_of(name)
    idle = find_idle_parameters(build_meta_model(of(name), ModelSection(name_or_path="x")))
    adapter = AdapterSection(r=2, target_modules=targets)
    check_adapter(adapter, model, idle)
    adapted = get_peft_model(model, lora_config(adapter, model, idle))
    trained = {key for key, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".language_model.layers." in key for key in trained)
    assert trained & without_gradient(adapted) == set()


def test_a_frozen_tower_does_not_block_ddp_and_is_saved(tmp_path: Path) -> None:
    model = model_of("Gemma 3")
    bare = build_meta_model(GEMMA3, ModelSection(name_or_path="x"))
    idle = find_idle_parameters(bare)
    freeze(model, idle)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} & without_gradient(
        model
    ) == set()
    count = sum(weight.numel() for name, weight in model.named_parameters() if not weight.requires_grad)
    assert describe_idle(bare, idle) == (
        f"{count:,} parameters are not trained, since no text reaches them: vision_tower, multi_modal_projector"
    )
    model.save_pretrained(tmp_path)
    again = auto_model_class(model.config).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())


def test_a_model_is_loaded_completely_or_as_the_text_part_that_was_saved() -> None:
    config = Qwen3_5Config()
    for saved_as in ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"):
        config.architectures = [saved_as]
        assert auto_model_class(config)._model_mapping[type(config)].__name__ == saved_as
    assert find_idle_parameters(build_meta_model(GEMMA3.text_config, ModelSection(name_or_path="x"))) == frozenset()


def test_without_fake_tensors_everything_outside_the_decoder_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = build_meta_model(of("LLaVA"), ModelSection(name_or_path="x"))
    idle = find_idle_parameters(bare)
    monkeypatch.setattr(type(bare), "forward", None)
    assert find_idle_parameters(bare) == idle != frozenset()


def test_plans_count_a_tower_in_memory_but_not_as_trained(recipe_file: Callable[..., Path]) -> None:
    model = model_of("Gemma 3")
    shape = inspect_architecture(load_recipe(recipe_file()), of("Gemma 3"))
    assert shape.total == sum(weight.numel() for weight in model.parameters())
    unreached = without_gradient(model)
    assert shape.trained == sum(weight.numel() for name, weight in model.named_parameters() if name not in unreached)
    assert {parameter.name for parameter in shape.parameters if parameter.unused} == unreached
    assert len(shape.windows) == 2
