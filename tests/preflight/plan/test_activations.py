"""Activations from the trace of a few layers: against a trace of all layers, against the bytes of real runs on a CPU,
and against counts by hand."""

import contextlib
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
)
from trl.trainer.utils import add_fused_lm_head

from train.errors import UserError
from train.preflight.plan.activations import ActivationTracer
from train.preflight.plan.fused_head import TOKEN_CHUNK, VOCABULARY_CHUNK, FusedHeadAllocations
from train.recipe import AdapterSection, QuantizationSection
from train.recipe.schema import ModelSection

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 9,
    "pad_token_id": 0,
}
LORA = AdapterSection(r=4, lora_dropout=0.05, target_modules=("o_proj", "down_proj"))
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),
    "phi3 longrope": Phi3Config(**SIZES, original_max_position_embeddings=4096, rope_scaling=LONGROPE),
    "falcon-h1": FalconH1Config(
        **SIZES | {"num_hidden_layers": 5},
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=64,
    ),
}
BF16: dict[str, Any] = {"weights": "bfloat16", "autocast": False}
FLOAT32: dict[str, Any] = {"weights": "float32", "autocast": True}


def tracer(config: PreTrainedConfig, attention: str = "auto", **sections: Any) -> ActivationTracer:
    recipe: Any = SimpleNamespace(
        model=ModelSection(name_or_path="x", attention=attention),  # type: ignore[arg-type]
        joins_documents=True,
        **{"adapter": None, "quantization": None, "training": {}} | sections,
    )
    return ActivationTracer(recipe, config)


@cache
def llama() -> ActivationTracer:
    """Return a tracer that several tests ask for the same traces."""
    return tracer(CONFIGS["llama"])


@cache
def llama_with_lora() -> ActivationTracer:
    """Return the same with an adapter."""
    return tracer(CONFIGS["llama"], adapter=LORA)


@pytest.mark.parametrize(
    ("name", "settings", "adapter"),
    [
        ("llama", BF16 | {"checkpointing": "full"}, None),
        ("llama", FLOAT32 | {"checkpointing": "none"}, None),
        ("gemma2", FLOAT32 | {"checkpointing": "full"}, None),
        ("gemma3", BF16 | {"checkpointing": "selective"}, LORA),
        ("phi3 longrope", BF16 | {"checkpointing": "none"}, LORA),
        ("falcon-h1", BF16 | {"checkpointing": "none"}, None),
    ],
)
def test_a_few_layers_stand_for_all(name: str, settings: dict[str, Any], adapter: AdapterSection | None) -> None:
    model = tracer(CONFIGS[name], adapter=adapter)
    traced = model.trace_all_layers(**settings, tokens=8_192)
    assert tuple(model.activations(**settings, tokens=8_192, longest=8_192)) == pytest.approx(tuple(traced), rel=1e-6)


@pytest.mark.parametrize("tokens", [6_000, 40_960])
def test_the_bytes_of_other_lengths_follow_from_two(tokens: int) -> None:
    settings = BF16 | {"checkpointing": "none"}
    planned = llama().activations(**settings, tokens=tokens, longest=tokens)
    traced = llama().trace_all_layers(**settings, tokens=tokens)
    assert planned.peak == pytest.approx(traced.peak, rel=1e-3)


def real_bytes(config: PreTrainedConfig, attention: str, tokens: int, settings: dict[str, Any]) -> int:
    """Return the most bytes that the second micro-batch of a real training step allocates on the CPU."""
    dtype = getattr(torch, settings["weights"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    if settings["checkpointing"] == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, positions = (
        torch.zeros(1, tokens, dtype=torch.long),
        torch.arange(tokens // 2).repeat(2)[None],
    )  # two documents

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16) if settings["autocast"] else contextlib.nullcontext():
            outputs = model(input_ids=ids, labels=ids, position_ids=positions, fused_lm_head=True)
        outputs.loss.backward()

    train()
    with LiveBytes([*model.parameters(), *(weight.grad for weight in model.parameters())]) as live:
        train()
    return live.peak


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("weights", "autocast", "attention"),
    [("bfloat16", False, "sdpa"), ("bfloat16", False, "eager"), ("float32", False, "sdpa"), ("float32", True, "eager")],
)
def test_the_trace_is_what_a_real_step_allocates(
    weights: str, autocast: bool, checkpointing: str, attention: str
) -> None:
    """The vocabulary is small: TRL's head on a CPU copies a tile of logits several times, which a GPU doesn't."""
    sizes = {"vocab_size": 16, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    config = LlamaConfig(**SIZES | sizes)
    settings = {"weights": weights, "autocast": autocast, "checkpointing": checkpointing}
    planned = tracer(config, attention).activations(**settings, tokens=512, longest=512)  # type: ignore[arg-type]
    assert planned.peak == pytest.approx(real_bytes(config, attention, 512, settings), rel=0.03)


def test_full_checkpointing_keeps_the_input_of_each_layer() -> None:
    nine, twenty = (
        tracer(LlamaConfig(**SIZES | {"num_hidden_layers": layers})).activations(
            **BF16, checkpointing="full", tokens=1_024, longest=1_024
        )
        for layers in (9, 20)
    )
    assert twenty.kept - nine.kept == 11 * 1_024 * 64 * 2
    assert (twenty.working, twenty.head) == (nine.working, nine.head)


def test_selective_checkpointing_keeps_the_output_of_attention_besides() -> None:
    """The output [tokens, heads x size] and a float32 per head; the operator's input is computed again."""
    full, selective = (
        llama().activations(**BF16, checkpointing=checkpointing, tokens=8_192, longest=8_192)
        for checkpointing in ("full", "selective")
    )
    per_layer = selective.kept - full.kept
    assert per_layer == pytest.approx(9 * 8_192 * (2 * 64 + 4 * 4), rel=0.001)


def test_a_micro_batch_of_twice_the_tokens_keeps_twice_as_much() -> None:
    small, large = (
        llama().activations(**BF16, checkpointing="none", tokens=tokens, longest=8_192) for tokens in (8_192, 16_384)
    )
    assert large.kept == pytest.approx(2 * small.kept, rel=0.001)


def test_eager_attention_keeps_the_square_of_the_row() -> None:
    """Softmax in float32 and once more in the dtype of the values: 4 + 2 bytes per head and pair of tokens."""
    config = LlamaConfig(**SIZES)
    eager, sdpa = (
        tracer(config, attention).activations(**BF16, checkpointing="none", tokens=1_024, longest=1_024)
        for attention in ("eager", "sdpa")
    )
    assert eager.kept - sdpa.kept == pytest.approx(9 * 4 * 1_024**2 * (4 + 2), rel=0.1)


def test_adapters_in_bfloat16_keep_less_than_in_float32() -> None:
    """DeepSpeed casts them; else peft casts their input: with dropout a float32 of the input of each linear layer."""
    wide, narrow = (
        llama_with_lora().activations(**BF16, checkpointing="none", tokens=8_192, longest=8_192, adapter=adapter)
        for adapter in ("float32", "bfloat16")
    )
    assert narrow.kept < 0.8 * wide.kept


def test_a_frozen_4_bit_layer_keeps_no_input() -> None:
    qlora = tracer(CONFIGS["llama"], adapter=LORA, quantization=QuantizationSection())
    settings: dict[str, Any] = BF16 | {"checkpointing": "none", "tokens": 8_192, "longest": 8_192}
    full = llama().activations(**settings)
    in_bf16 = llama_with_lora().activations(**settings, adapter="bfloat16")
    assert qlora.activations(**settings).kept == pytest.approx(in_bf16.kept, rel=0.02)
    assert full.head > in_bf16.head


def test_the_stand_in_of_the_head_allocates_what_trl_does() -> None:
    """In float32 TRL's CPU form differs from that of a GPU by temporaries of a tile, which are small here."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight = torch.randn(2_048, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    targets = torch.zeros(2_048, dtype=torch.long)

    def peak(function: Any, *arguments: Any) -> int:
        with LiveBytes([hidden, weight, targets]) as live:
            log_probabilities, *_ = function.apply(hidden, weight, None, targets, *arguments)
            torch.autograd.grad(log_probabilities.sum(), [hidden, weight])
        return live.peak

    real = peak(ChunkedLogProbFunction, 1.0, 4, None, 1.0, ("entropy", "is_top1"))
    assert peak(FusedHeadAllocations, 4) == pytest.approx(real, rel=0.05)


def test_the_head_holds_no_logits_but_a_tile() -> None:
    """16,384 tokens of a vocabulary of 128,256: logits would be 4.2 GB in bfloat16."""
    config = LlamaConfig(**SIZES | {"vocab_size": 128_256, "num_hidden_layers": 1})
    head = tracer(config).activations(**BF16, checkpointing="full", tokens=16_384, longest=8_192).head
    tile = TOKEN_CHUNK * VOCABULARY_CHUNK * 2
    assert head == pytest.approx(tile + 16_384 * 64 * (2 + 4) + 128_256 * 64 * (4 + 2), rel=0.02)


def test_the_tiles_of_the_head_are_those_of_trl() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert (TOKEN_CHUNK, VOCABULARY_CHUNK) == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_a_model_that_fake_tensors_cannot_run_is_refused_with_the_reason() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4)  # its grouped products exist in 16 bits only
    with pytest.raises(UserError, match=r"^--gpus: the memory of x can't be planned: .*BF16.*Leave out --gpus"):
        tracer(config).activations(weights="float32", autocast=False, checkpointing="none", tokens=8_192, longest=8_192)


def test_float16_takes_the_bytes_of_bfloat16() -> None:
    """Also for QLoRA, whose adapters are bfloat16 under float16's autocast."""
    training = {"fp16": True, "bf16": False}
    for name in ("float16", "bfloat16"):
        section = QuantizationSection(load_in_4bit=True, bnb_4bit_compute_dtype=name, bnb_4bit_quant_storage="uint8")
        model = tracer(
            CONFIGS["llama"], adapter=LORA, quantization=section, training=training if name == "float16" else {}
        )
        settings: dict[str, Any] = {"weights": "bfloat16", "autocast": True, "checkpointing": "none"}
        traced = model.activations(**settings, tokens=2_048, longest=2_048)
        if name == "float16":
            half = traced
    assert half == traced
    assert half.kept > 0


@pytest.mark.parametrize(
    ("weights", "autocast", "attention"),
    [("bfloat16", False, "sdpa"), ("float32", False, "eager"), ("float32", True, "eager")],
)
def test_an_evaluation_allocates_what_the_trace_says(weights: str, autocast: bool, attention: str) -> None:
    """Forward alone: no layer keeps anything, but autocast its casts of all weights."""
    sizes = {"vocab_size": 16, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    config = LlamaConfig(**SIZES | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, weights), attn_implementation=attention)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.eval()
    ids, positions = torch.zeros(1, 512, dtype=torch.long), torch.arange(256).repeat(2)[None]
    half = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with LiveBytes([*model.parameters()]) as live, torch.no_grad(), half:
        model(input_ids=ids, labels=ids, position_ids=positions, fused_lm_head=True, use_cache=False)
    planned = tracer(config, attention).evaluation(weights=weights, autocast=autocast, tokens=512, longest=512)
    assert planned == pytest.approx(live.peak, rel=0.03)
