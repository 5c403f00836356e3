"""Values of a wrong type in a model's JSON files: one error that names the file, whatever transformers raises."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ODD: dict[str, tuple[str, Any, str]] = {
    "a type that torch lacks": ("config.json", {"dtype": "bf16"}, "bf16"),
    "a list of types": ("config.json", {"dtype": ["float32"]}, "IndexError"),
    "a list of kinds": ("config.json", {"model_type": ["llama"]}, "TypeError"),
    "a number as classes": ("config.json", {"architectures": 3}, "TypeError"),
    "a text as quantization": ("config.json", {"quantization_config": "4bit"}, "AttributeError"),
    "an unknown activation": ("config.json", {"hidden_act": "nosuch"}, "nosuch"),
    "unknown positions": ("config.json", {"rope_parameters": {"rope_type": "nosuch"}}, "nosuch"),
    "no heads": ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    "padding out of range": ("config.json", {"pad_token_id": 99_999}, "Padding_idx"),
    "a list as map": ("special_tokens_map.json", [1], "'list' object"),
    "null as added tokens": ("added_tokens.json", None, "NoneType"),
    "a text as settings": ("tokenizer_config.json", "x", "'str' object"),
    "a number as end token": ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
    "an unknown version": ("tokenizer.json", {"version": "9"}, "Unknown tokenizer version"),
    "no tokenizer": ("tokenizer.json", [{"a": 1}], "TypeError"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_value_that_cannot_be_used_is_one_error(
    kind: str, tiny_model: Path, tmp_path: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    name, content, words = ODD[kind]
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    merged = content
    if isinstance(content, dict):
        merged = {**json.loads((base / name).read_text()), **content}
    (base / name).write_text(json.dumps(merged))
    error = refused("--recipe", recipe_file(model={"name_or_path": str(base)}), "--check")
    assert error.startswith(f"model.name_or_path: {base}")
    assert name in error
    assert words in error
