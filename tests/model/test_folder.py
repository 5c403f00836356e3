"""Folders named as the model: the error for each kind, before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from train.errors import UserError
from train.model.folder import adapter_base, check_model_folder, is_adapter_alone
from train.model.load import copy_processor, load_saved
from train.recipe import ModelSection

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def put(folder: Path, *names: str, **contents: object) -> None:
    """Write files: empty JSON objects by name, and by keyword (dots as __) what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def weights(folder: Path, name: str = "model.safetensors", *shape: int) -> None:
    save_file({"model.norm.weight": torch.zeros(shape or (2,))}, folder / name)


def complete(folder: Path) -> None:
    put(folder, "config.json", "tokenizer.json")
    weights(folder)


def error_of(folder: Path, **settings: object) -> str | None:
    """Return the error for the folder; None where it passes."""
    try:
        check_model_folder(ModelSection(name_or_path=str(folder), **settings))
    except UserError as refusal:
        return str(refusal)
    return None


def adapter(folder: Path) -> None:
    put(folder, adapter_config__json={"base_model_name_or_path": "org/base"})
    weights(folder, "adapter_model.safetensors")


FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "an adapter alone": (adapter, ["adapter (trained on org/base)", "scripts/merge_adapter.py", "--output"]),
    "an adapter with a config.json": (
        lambda folder: (adapter(folder), put(folder, "config.json", "tokenizer.json")),
        ["not a complete model", "scripts/merge_adapter.py"],
    ),
    "base and adapter": (
        lambda folder: (adapter(folder), complete(folder)),
        ["a complete model and an adapter", "scripts/merge_adapter.py", "--base"],
    ),
    "an adapter without its weights": (
        lambda folder: put(folder, adapter_config__json={"base_model_name_or_path": "org/base"}),
        ["without its weights (adapter_model.safetensors)"],
    ),
    "an adapter without its config": (
        lambda folder: weights(folder, "adapter_model.safetensors"),
        ["without adapter_config.json"],
    ),
    "nothing": (lambda folder: None, ["is empty"]),
    "one level too high": (
        lambda folder: put(folder, "one/config.json", "two/config.json", "README.md"),
        ["folders with models", "/one", "/two", "Name one of them"],
    ),
    "a folder of the hub's cache": (
        lambda folder: put(folder, "snapshots/0123abc/config.json", "refs/main"),
        ["hub's cache", "snapshots/0123abc"],
    ),
    "a pipeline of diffusers": (lambda folder: put(folder, "model_index.json", "unet/config.json"), ["diffusion"]),
    "an embedding model": (lambda folder: put(folder, "modules.json", "0_T/config.json"), ["sentence-transformers"]),
    "a tokenizer alone": (lambda folder: put(folder, "tokenizer.json", "vocab.json"), ["a tokenizer alone"]),
    "weights alone": (weights, ["weights without config.json"]),
    "data": (lambda folder: put(folder, "rows.jsonl"), ["holds no model", "rows.jsonl"]),
    "no tokenizer": (lambda folder: (put(folder, "config.json"), weights(folder)), ["no tokenizer", "Copy"]),
    "no weights": (lambda folder: put(folder, "config.json", "tokenizer.json"), ["no weights", INDEX]),
    "a variant of the weights": (
        lambda folder: (put(folder, "config.json", "tokenizer.json"), weights(folder, "model.fp16.safetensors")),
        ["no weights", "model.fp16.safetensors"],
    ),
    "shards missing": (
        lambda folder: (
            put(folder, "config.json", "tokenizer.json"),
            weights(folder, "a.safetensors"),
            (folder / INDEX).write_text(json.dumps({"weight_map": {c: f"{c}.safetensors" for c in "abcdef"}})),
        ),
        ["lacks 5 of the 6 files", "b.safetensors", "and 2 more"],
    ),
    "an index of nothing": (
        lambda folder: put(folder, "config.json", "tokenizer.json", INDEX),
        [INDEX, "names no weights"],
    ),
    "Git LFS pointers": (
        lambda folder: put(folder, "config.json", "tokenizer.json", model__safetensors=POINTER),
        ["Git LFS pointers", "git lfs pull"],
    ),
    "half of a file": (
        lambda folder: (
            complete(folder),
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4]),
        ),
        ["can't be loaded", "model.safetensors"],
    ),
    "weights that ZeRO-3 left empty": (lambda folder: (complete(folder), weights(folder, "model.safetensors", 0)), ["ZeRO-3"]),
    "pickles": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "pytorch_model.bin"),
        ["pickle", "model.allow_pickle: true"],
    ),
    "pickles in shards": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "pytorch_model.bin.index.json"),
        ["pickle", "model.allow_pickle: true"],
    ),
    "GGUF": (lambda folder: put(folder, "model.Q4_K_M.gguf"), ["GGUF", "model.Q4_K_M.gguf"]),
    "GGUF with a config": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "m.gguf"),
        ["GGUF", "Name the model that they were made from"],
    ),
    "Meta's layout": (lambda folder: put(folder, "params.json", "consolidated.00.pth"), ["Meta's own layout"]),
    "Mistral's layout with a config": (
        lambda folder: (put(folder, "config.json", "tekken.json"), weights(folder, "consolidated.safetensors")),
        ["Mistral's", "model.safetensors"],
    ),
    "DeepSpeed's pieces": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "zero_to_fp32.py", "global_step4/x.pt"),
        ["DeepSpeed", "zero_to_fp32.py", "--resume"],
    ),
    "FSDP's pieces": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "pytorch_model_fsdp_0/__0_0.distcp"),
        ["FSDP", "accelerate merge-weights", "--resume"],
    ),
    "a checkpoint without weights": (
        lambda folder: put(folder, "config.json", "tokenizer.json", "trainer_state.json", "optimizer.pt"),
        ["training run", "--resume"],
    ),
    "TensorFlow's weights": (lambda folder: put(folder, "config.json", "tokenizer.json", "tf_model.h5"), ["TensorFlow"]),
    "MLX": (
        lambda folder: (
            complete(folder),
            put(folder, config__json={"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}),
        ),
        ["MLX", "quantized from"],
    ),
    "GPTQ of old": (lambda folder: (complete(folder), put(folder, "quantize_config.json")), ["GPTQ", "quantize_config.json"]),
    "AWQ of old": (lambda folder: (complete(folder), put(folder, "quant_config.json")), ["AWQ", "quant_config.json"]),
    "a broken config": (lambda folder: (complete(folder), put(folder, config__json="{")), ["config.json", "can't be read"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_trained_is_described(kind: str, tmp_path: Path) -> None:
    make, words = FOLDERS[kind]
    make(tmp_path)
    error = error_of(tmp_path)
    assert error is not None
    assert error.startswith(f"model.name_or_path: {tmp_path} ")
    assert [word for word in words if word not in error] == [], error


def test_complete_models_pass_in_every_form(tmp_path: Path) -> None:
    complete(tmp_path)
    assert error_of(tmp_path) is None
    put(tmp_path, "trainer_state.json", "optimizer.pt", "params.json", "preprocessor_config.json")
    assert error_of(tmp_path) is None  # a checkpoint of ours, Mistral's both layouts in one folder
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    assert error_of(tmp_path) is None
    assert error_of(tmp_path / "elsewhere") is None  # not there, or a hub id: for others to say
    (tmp_path / INDEX).unlink()
    put(tmp_path, "pytorch_model.bin")
    assert error_of(tmp_path, allow_pickle=True) is None


def test_a_file_in_place_of_its_folder(tmp_path: Path) -> None:
    complete(tmp_path)
    assert f"Name the folder that it is in: {tmp_path}" in str(error_of(tmp_path / "model.safetensors"))
    put(tmp_path, "m.gguf")
    assert "GGUF" in str(error_of(tmp_path / "m.gguf"))


def test_a_plan_for_other_machines_needs_no_weights(tmp_path: Path) -> None:
    put(tmp_path, "config.json", "tokenizer.json")
    check_model_folder(ModelSection(name_or_path=str(tmp_path)), weights=False)
    put(tmp_path, "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        check_model_folder(ModelSection(name_or_path=str(tmp_path)), weights=False)


def test_an_adapter_and_its_base(tmp_path: Path) -> None:
    adapter(tmp_path)
    put(tmp_path, "config.json")
    assert is_adapter_alone(tmp_path)
    assert adapter_base(tmp_path) == "org/base"
    weights(tmp_path)
    assert not is_adapter_alone(tmp_path)


@pytest.mark.parametrize("kind", ["an adapter alone", "base and adapter", "no tokenizer", "GGUF"])
def test_training_and_check_raise_the_same_error(
    kind: str, recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    FOLDERS[kind][0](tmp_path / "model")
    recipe = recipe_file(model={"name_or_path": str(tmp_path / "model")})
    assert refused("--recipe", recipe) == refused("--recipe", recipe, "--check")
    assert not (tmp_path / "run").exists()


def test_a_saved_adapter_with_a_config_beside_it_is_used_on_its_base(tiny_model: Path, tmp_path: Path) -> None:
    """axolotl leaves the base's config.json there, and transformers would then look for the base's weights."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[1, 50, 300, 2]])
    bare = base(ids).logits
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(ids).logits
    for _ in range(2):
        logits = load_saved(str(tmp_path / "adapter"))(ids).logits
        torch.testing.assert_close(logits, expected)
        assert not torch.allclose(logits, bare)
        shutil.copy(tiny_model / "config.json", tmp_path / "adapter")


def test_a_processor_goes_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    put(tmp_path, "preprocessor_config.json", "config.json")
    model = ModelSection(name_or_path=str(tmp_path))
    assert copy_processor(model, tmp_path / "saved") == ["preprocessor_config.json"]
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["preprocessor_config.json"]
    assert copy_processor(model, tmp_path) == []
