"""Verification of saves: missing, empty and reshaped weights are errors, and a complete save passes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from train.errors import UserError
from train.loop.checkpoint.verification import check_saved

Damage = Callable[[dict[str, torch.Tensor]], object]


def empty(name: str) -> Damage:
    return lambda weights: weights.update({name: torch.empty(0)})


def lose(name: str) -> Damage:
    return lambda weights: weights.pop(name)


def turn(name: str) -> Damage:
    return lambda weights: weights.update({name: weights[name].T.contiguous()})


def damage(path: Path, how: Damage) -> None:
    weights = load_file(path)
    how(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


GATE, EMBEDDING = "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"


def test_a_complete_model_passes_tied_or_not_sharded_or_not(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")  # by right
    check_saved(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    check_saved(model, tmp_path / "many")
    # DeepSpeed may write the other of two tied names
    damage(tmp_path / "one" / "model.safetensors", lambda w: w.update({"lm_head.weight": w.pop(EMBEDDING)}))
    check_saved(model, tmp_path / "one")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (empty(GATE), f"{GATE} is empty in the file and 128 x 64 in the model"),
        (lose(GATE), f"{GATE} is missing"),
        (lose(EMBEDDING), f"{EMBEDDING} is missing"),
        (turn(GATE), f"{GATE} is 64 x 128 in the file and 128 x 64"),
    ],
)
def test_a_damaged_model_is_an_error_that_names_the_weight(
    model: PreTrainedModel, tmp_path: Path, how: Damage, message: str
) -> None:
    model.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors", how)
    with pytest.raises(UserError, match="are incomplete") as error:
        check_saved(model, tmp_path)
    assert message in str(error.value)


def test_an_untied_output_layer_must_be_there(model: PreTrainedModel, tmp_path: Path) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    damage(tmp_path / "model.safetensors", lose("lm_head.weight"))
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        check_saved(model, tmp_path)


def test_a_lost_shard_or_none_at_all_is_an_error(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors should hold the weights"):
        check_saved(model, tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=shard.name):
        check_saved(model, tmp_path)


def test_a_file_of_another_save_that_would_be_loaded_instead_is_an_error(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors").write_bytes(old)
    with pytest.raises(UserError, match="from another save"):
        check_saved(model, tmp_path)


def test_names_that_transformers_changes_on_saving_are_expected(tmp_path: Path) -> None:
    """Mixtral's experts are one tensor in memory and many in the file."""
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, head_dim=8,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() != model.state_dict().keys()
    check_saved(model, tmp_path)
    name = next(name for name in saved if "experts.2.w1" in name)
    damage(tmp_path / "model.safetensors", lose(name))
    with pytest.raises(UserError, match="experts"):
        check_saved(model, tmp_path)


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_are_verified(model: PreTrainedModel, tmp_path: Path, settings: dict) -> None:
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, **settings))
    peft_model.save_pretrained(tmp_path)
    check_saved(peft_model, tmp_path)
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert LORA in names
    for name in (LORA, names[-1], *(["base_model.model.lm_head.weight"] if "modules_to_save" in settings else [])):
        for how, message in ((empty(name), "is empty"), (lose(name), "is missing")):
            peft_model.save_pretrained(tmp_path)
            damage(tmp_path / "adapter_model.safetensors", how)
            with pytest.raises(UserError, match=f"{name} {message}"):
                check_saved(peft_model, tmp_path)


def test_a_damaged_checkpoint_stops_the_run_and_is_never_complete(
    refused: Callable[..., str], recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every checkpoint and for the finished model: a file that is complete but lacks a weight."""
    from train.loop.trainer import JanusTrainer

    save = JanusTrainer._save

    def lossy(self: JanusTrainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save(self, output_dir, state_dict)
        damage(Path(output_dir or self.args.output_dir) / "model.safetensors", empty(GATE))

    monkeypatch.setattr(JanusTrainer, "_save", lossy)
    message = refused("--recipe", recipe_file(training={"save_strategy": "steps", "save_steps": 1}))
    assert f"{tmp_path}/run/checkpoint-1 couldn't be written: " in message
    assert f"checkpoint-1 are incomplete: {GATE} is empty" in message
    assert not list(tmp_path.glob("run/**/checkpoint-*"))
    message = refused("--recipe", recipe_file(training={"save_strategy": "no"}), "--resume", "never")
    assert f"{tmp_path}/run are incomplete" in message
    assert json.loads((tmp_path / "run" / "config.json").read_text())
