"""scripts/merge_adapter.py: the merged model computes what base and adapter compute, for all kinds of adapters."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("merge_adapter", ROOT / "scripts" / "merge_adapter.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

LINEAR = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "patterns": {"target_modules": LINEAR, "alpha_pattern": {"v_proj": 64}, "rank_pattern": {"q_proj": 2}},
    "head saved": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "norm"]},
    "embedding adapted": {"target_modules": [*LINEAR, "embed_tokens"]},
}


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter whose every weight differs from what it starts as, so that all of it shows."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 16, **settings}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in some ten files."""
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str | Path) -> str:
        assert script.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err.removeprefix("error: ")

    return run


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("base_is", ["tiny_model", "sharded"])
def test_merged_logits_equal_those_of_base_and_adapter(
    kind: str, base_is: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    base: Path = request.getfixturevalue(base_is)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    assert script.main([str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "largest difference" in capsys.readouterr().out
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(2))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    base_logits = plain(ids).logits
    expected = PeftModel.from_pretrained(plain, adapter)(ids).logits
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert (expected - base_logits).abs().max() > 0.1
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    names = {path.name for path in base.iterdir() if path.suffix == ".safetensors"}
    assert {path.name for path in (tmp_path / "merged").iterdir() if path.suffix == ".safetensors"} == names
    AutoTokenizer.from_pretrained(tmp_path / "merged")


def test_weights_keep_their_type_and_are_rounded_once(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert script.main([str(adapter), "--output", str(tmp_path / "merged")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    delta = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    factors = {side: delta[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB"}
    expected = (before[f"{name}.weight"].double() + 16 / 4 * factors["B"] @ factors["A"]).bfloat16()
    assert torch.equal(after[f"{name}.weight"], expected)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize(
    ("kind", "dtype", "base_dtype"),
    [
        ("lora", "bfloat16", "float32"),
        ("dora", "float16", "float32"),
        ("embedding adapted", "bfloat16", "float32"),
        ("embedding saved", "bfloat16", "float32"),
        ("lora", "float16", "bfloat16"),
        ("lora", "bfloat16", "float16"),
    ],
)
def test_weights_are_rounded_once_to_another_type(
    kind: str, dtype: str, base_dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Compare with a rounded merge in float32: --dtype must not round the base before the update is added."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, base_dtype)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    arguments = [str(adapter), "--no-compare", "--output"]
    assert script.main([*arguments, str(tmp_path / "float32"), "--dtype", "float32"]) == 0
    assert script.main([*arguments, str(tmp_path / "merged"), "--dtype", dtype]) == 0
    float32, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "merged"))
    assert float32.keys() == merged.keys()
    for name, value in float32.items():
        assert torch.equal(merged[name], value.to(getattr(torch, dtype))), name


def test_tokenizer_and_stop_tokens_of_the_adapter_are_copied(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=LINEAR)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }} of the adapter"
    tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert script.main([str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template.endswith("of the adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [2, 7]


def test_a_merge_with_a_wrong_tensor_is_refused(
    tiny_model: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder is left that could be mistaken for a model."""
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=LINEAR)
    from train.model import merge

    def merge_without_one(*arguments: Any) -> int:
        count = merge_all(*arguments)
        weights = load_file(arguments[2] / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name] = load_file(tiny_model / "model.safetensors")[name]
        save_file(weights, arguments[2] / "model.safetensors", metadata={"format": "pt"})
        return count

    merge_all = merge.merge_adapter
    monkeypatch.setattr(merge, "merge_adapter", merge_without_one)
    assert "differs from base and adapter" in refused(adapter, "--output", tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_unsupported_bases_and_adapters_are_refused(
    tiny_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=LINEAR)
    output = ["--output", tmp_path / "merged"]
    assert "there is no adapter_config.json, so it holds no adapter" in refused(tiny_model, *output)
    assert "there is no such folder" in refused(tmp_path / "nowhere", *output)
    stopped = tmp_path / "stopped"
    shutil.copytree(adapter, stopped / "checkpoint-3")
    assert "A stopped run has its adapter in a checkpoint: checkpoint-3." in refused(stopped, *output)
    assert "exists already" in refused(adapter, "--output", tiny_model)

    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "--base" in refused(adapter, *output, "--base", quantized)

    renamed = tmp_path / "renamed"
    shutil.copytree(tiny_model, renamed)
    weights = load_file(renamed / "model.safetensors")
    save_file({f"other.{name}": value for name, value in weights.items()}, renamed / "model.safetensors")
    assert "hold no weight model.layers.0.mlp.down_proj.weight" in refused(adapter, *output, "--base", renamed)

    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_bias": True}))
    assert "lora_bias" in refused(adapter, *output)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("compare", [[], ["--no-compare"]], ids=["logits", "weights only"])
@pytest.mark.parametrize("case", ["one folder", "another adapter in the base", "settings only", "an adapter as base"])
def test_a_base_with_an_adapter_in_its_folder_is_refused(
    case: str, compare: list[str], tiny_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """transformers applies an adapter in the model's folder by itself: it would be merged and then applied again."""
    base, output = tmp_path / "base", ["--output", tmp_path / "merged", *compare]
    if case == "an adapter as base":
        make_adapter(tiny_model, base, target_modules=["q_proj"])
    else:
        shutil.copytree(tiny_model, base)
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    names = ["adapter_config.json", *(["adapter_model.safetensors"] if case != "settings only" else [])]
    for name in names:
        shutil.copy(adapter / name, base / name)
    error = refused(base if case == "one folder" else adapter, "--base", base, *output)
    assert error.startswith(f"{base}: a base must hold no adapter, and it has adapter_config.json")
    assert not list(tmp_path.glob("merged*"))


def test_an_adapter_trained_on_4_bit_weights_is_merged_with_a_warning(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", target_modules=LINEAR)
    (adapter / "recipe.yaml").write_text(yaml.safe_dump({"quantization": {"load_in_4bit": True}}))
    assert script.main([str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "warning: this adapter was trained on the 4-bit base" in capsys.readouterr().err.splitlines()[-1]


def scale_update(adapter: Path, factor: float) -> Path:
    """Scale the update of an adapter, as after few training steps."""
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value * factor if "lora_B" in name else value for name, value in weights.items()}, path)
    return adapter


@pytest.mark.parametrize("compare", [[], ["--no-compare"]], ids=["logits", "weights only"])
def test_an_unmerged_base_is_refused_even_if_the_update_is_small(
    compare: list[str], tiny_model: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = scale_update(make_adapter(tiny_model, tmp_path / "adapter", target_modules=LINEAR), 1e-4)
    from train.model import merge

    def merge_nothing(*arguments: Any) -> int:
        count = merge_all(*arguments)
        shutil.copy(tiny_model / "model.safetensors", arguments[2])
        return count

    merge_all = merge.merge_adapter
    monkeypatch.setattr(merge, "merge_adapter", merge_nothing)
    assert "is not base plus update" in refused(adapter, "--output", tmp_path / "merged", *compare)
    assert not list(tmp_path.glob("merged*"))


def test_an_update_lost_to_rounding_is_refused_and_kept_in_float32(
    tiny_model: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = scale_update(make_adapter(base, tmp_path / "adapter", target_modules=LINEAR), 1e-3)
    error = refused(adapter, "--output", tmp_path / "merged")
    assert "of the update survives rounding to bfloat16" in error
    assert "`--dtype float32`" in error
    assert not list(tmp_path.glob("merged*"))
    assert script.main([str(adapter), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "100.0% of the update survives rounding to float32" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(2))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, adapter)(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_an_untrained_adapter_is_merged_with_a_warning(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, r=4, **settings)
    get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    assert script.main([str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert "changes no weight: all its updates are zero" in capsys.readouterr().err
