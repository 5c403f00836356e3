"""torch.compile of packed sequences with torch_varlen: no graph break in a layer, and no compilation from pack to pack."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.other import compile_regions, compile_regions_fsdp2
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head
from varlen_kernels import stand_in_kernel

from train.model.attention import torch_varlen as varlen

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attn_logit_softcapping": None,  # Gemma-2's, which torch_varlen does not support
    "sliding_window": 24,
}
PACKS = [[30, 40, 50, 7], [60, 9, 44], [33, 80], [12, 13, 14, 15, 16, 17], [100], [51, 52, 53], [61, 2], [90, 8, 7, 6]]
"""Tokens of the documents of eight packs: all different in tokens, documents and longest document, but for some."""


def build(kind: str, checkpointing: str = "none", layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=varlen.NAME)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if checkpointing == "selective":
        enable_selective_activation_checkpointing(model)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def packs() -> list[dict[str, Any]]:
    rng, collate = np.random.default_rng(0), DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    ids = [rng.integers(3, 60, sum(lengths)) for lengths in PACKS]
    return [
        collate([{"input_ids": tokens, "labels": tokens, "seq_lengths": lengths}])
        for tokens, lengths in zip(ids, PACKS, strict=True)
    ]


def step(model: torch.nn.Module, pack: dict[str, Any]) -> list[float]:
    """Return the loss and the gradient norm of a pack."""
    loss = -model(**pack, use_cache=False, fused_lm_head=True).log_probs.mean()
    model.zero_grad()
    loss.backward()
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return [loss.item(), torch.stack(norms).norm().item()]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "KERNEL", stand_in_kernel("2.13"))
    varlen.register()
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("kind", "checkpointing", "compile_layers"),
    [
        ("llama", "none", compile_regions),
        ("mistral", "selective", compile_regions),
        ("qwen2", "full", compile_regions_fsdp2),
        ("qwen3", "full", compile_regions),
        ("gemma2", "none", compile_regions_fsdp2),
    ],
)
def test_layers_are_one_graph_and_compiled_twice(kind: str, checkpointing: str, compile_layers: Any) -> None:
    """The first pack has fixed sizes, the second variable ones (torch's automatic dynamic shapes), which fit all.

    compile_regions replaces the layers in a copy of the model; compile_regions_fsdp2 compiles them in place.
    """
    plain = build(kind, checkpointing)
    compiled = compile_layers(copy.deepcopy(plain), backend="eager")
    graphs = []
    for pack in packs():
        assert step(compiled, pack) == pytest.approx(step(plain, pack), rel=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert 0 < graphs[0] < graphs[1]
    assert graphs[2:] == [graphs[1]] * 6


def test_breaks_of_a_complete_model_do_not_grow_with_its_layers() -> None:
    """They are in TRL's output head."""
    breaks = []
    for layers in 1, 2:
        torch._dynamo.reset()
        counters.clear()
        step(torch.compile(build("llama", layers=layers), backend="eager"), packs()[0])
        breaks.append(counters["graph_break"].copy())
    assert breaks[0].total() == breaks[1].total() <= 2
