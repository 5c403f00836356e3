"""Scores of labels on a CPU against TRL's fused head, which computes the logits of all tokens."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from train.loop import loss
from train.loop.loss import score_labels

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
FIELDS = ("log_probs", "entropy", "is_top1", "label_mask")
LABELS = {
    "one row": [[-100, -100, 5, 6, -100, 7]],
    "the first token": [[3, 4, -100, -100, -100, -100]],
    "two rows": [[-100, -100, 5, 6, 7, -100], [-100, 9, -100, 8, -100, -100]],
    "a row without labels": [[-100] * 6, [-100, 9, 8, 7, 6, 5]],
    "no label": [[-100] * 6],
    "all tokens": [[3, 4, 5, 6, 7, 8]],
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def inputs_of(labels: list[list[int]]) -> dict[str, Any]:
    ids = torch.randint(3, 60, (len(labels), len(labels[0])), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor(labels)}


def gradients(model: torch.nn.Module, outputs: Any) -> dict[str, torch.Tensor]:
    outputs.log_probs.sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])  # plain, soft-capped and scaled logits
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_scores_and_gradients_are_those_of_the_fused_head(kind: str, labels: list[list[int]]) -> None:
    model, inputs = build(kind), inputs_of(labels)
    other = copy.deepcopy(model)
    add_fused_lm_head(other, outputs=("log_probs", "entropy", "is_top1"))
    scored = score_labels(model, model, inputs)
    expected = other(**inputs, use_cache=False, fused_lm_head=True)
    for field in FIELDS:
        torch.testing.assert_close(scored[field], expected[field], rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(model, scored), gradients(other, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_last_token_of_a_part_of_a_sequence_is_scored() -> None:
    """Its label is the first of the next part, which another process has."""
    model, inputs = build("llama"), inputs_of(LABELS["one row"])
    inputs["shift_labels"] = torch.tensor([[-100, 5, 6, -100, 7, 8]])
    scored = score_labels(model, model, inputs)
    assert scored.label_mask.tolist() == [[False, True, True, False, True, True]]
    assert scored.log_probs[0, -1] < 0


def test_only_labels_get_logits() -> None:
    model, sizes = build("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda head, hidden, logits: sizes.append(logits.shape[1]))
    score_labels(model, model, inputs_of(LABELS["two rows"]))
    assert sizes == [4]  # positions at which one of the rows has a label


def test_adapters_are_trained() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    inputs = inputs_of(LABELS["one row"])
    expected = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    scored = score_labels(model, model, inputs)
    torch.testing.assert_close(scored.log_probs, expected)
    assert set(gradients(model, scored)) == {name for name, _ in model.named_parameters() if "lora" in name}


def test_logits_that_would_not_fit_are_left_to_the_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads = build("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda *arguments: heads.append(1))
    monkeypatch.setattr(loss, "LOGITS_LIMIT", 3 * SIZES["vocab_size"])
    score_labels(model, model, inputs_of(LABELS["one row"]))
    assert len(heads) == 1
    score_labels(model, model, inputs_of(LABELS["all tokens"]))  # the fused head multiplies by the weight itself
    assert len(heads) == 1
