"""Gemma-2, whose template bans the system role: both policies for system messages train a step."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from train.sft import main

MESSAGES = [
    {"role": "system", "content": "river stone"},
    {"role": "user", "content": "amber?"},
    {"role": "assistant", "content": "quiet"},
]
RENDERED = {
    "turn": "<bos><start_of_turn>system\nriver stone<end_of_turn>\n<start_of_turn>user\namber?<end_of_turn>\n"
    "<start_of_turn>model\nquiet<end_of_turn>\n",
    "merge_into_user": "<bos><start_of_turn>user\nriver stone\n\namber?<end_of_turn>\n"
    "<start_of_turn>model\nquiet<end_of_turn>\n",
}


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """Return a Gemma-2 of two layers with Gemma's template and a byte-level tokenizer with its control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        show_progress=False,
    )
    backend.train_from_iterator(["river stone"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    tokenizer.chat_template = (files("trl") / "chat_templates" / "gemma.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "gemma")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


@pytest.mark.parametrize("system_role", RENDERED)
def test_gemma_trains_a_step(system_role: str, gemma: Path, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    rows = tmp_path / "conversations.jsonl"
    rows.write_text((json.dumps({"messages": MESSAGES}) + "\n") * 4, encoding="utf-8")
    recipe = recipe_file(
        model={"name_or_path": str(gemma), "attention": "eager"},
        chat={"template": None, "system_role": system_role},
        data={"sources": [{"path": str(rows)}], "max_length": 256},
        training={"num_train_epochs": ..., "max_steps": 1},
    )
    assert main(["--recipe", str(recipe)]) == 0
    before, after = load_file(gemma / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.apply_chat_template(MESSAGES, tokenize=False) == RENDERED[system_role]
    assert saved.eos_token == "<end_of_turn>"


def test_gemmas_own_template_is_refused_as_it_loses_system_messages(
    gemma: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    error = refused("--recipe", recipe_file(model={"name_or_path": str(gemma)}, chat={"template": None}))
    assert "chat.system_role: native: the template of" in error
    assert "`merge_into_user`" in error
