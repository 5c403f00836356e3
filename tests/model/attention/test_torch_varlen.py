"""torch_varlen against attention under a dense mask, with stand-ins for torch's kernel and on a GPU; sdpa_by_document."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaForCausalLM
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from varlen_kernels import RUNS, VERSIONS, stand_in_kernel

from train.model.attention import torch_varlen as varlen
from train.model.attention.kernel_test import check_kernel

HEADS, KEY_HEADS, SIZE = 4, 2, 16


@pytest.fixture(params=[*VERSIONS, varlen.BY_DOCUMENT])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == varlen.BY_DOCUMENT:
        monkeypatch.setattr(varlen, "flash_varlen", varlen.sdpa_by_document)
    else:
        monkeypatch.setattr(varlen, "KERNEL", stand_in_kernel(request.param))
    RUNS.clear()
    return request.param


LAYER = SimpleNamespace(is_causal=True, config=SimpleNamespace(), modules=list)


def random_inputs(batch: int, tokens: int, key_tokens: int | None = None, value_size: int = SIZE) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [
        (HEADS, tokens, SIZE),
        (KEY_HEADS, key_tokens or tokens, SIZE),
        (KEY_HEADS, key_tokens or tokens, value_size),
    ]
    return [torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def expected(inputs: list[torch.Tensor], allowed: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Compute attention [batch, tokens, heads, size] with a dense mask [batch, tokens, key tokens]."""
    return scaled_dot_product_attention(*inputs, attn_mask=allowed[:, None], scale=scale, enable_gqa=True).transpose(
        1, 2
    )


def causal(tokens: int, key_tokens: int | None = None) -> torch.Tensor:
    key_tokens = key_tokens or tokens
    return torch.ones(tokens, key_tokens, dtype=torch.bool).tril(key_tokens - tokens)


def blocks(lengths: list[int]) -> torch.Tensor:
    return torch.block_diag(*(causal(length) for length in lengths)).bool()


def assert_same(output: torch.Tensor, right: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Return the outputs and the gradients of query, key and value."""
    torch.testing.assert_close(output, right)
    weights = torch.randn_like(right)
    for tensor, other in zip(
        torch.autograd.grad(output, inputs, weights), torch.autograd.grad(right, inputs, weights), strict=True
    ):
        torch.testing.assert_close(tensor, other)


def collated(lengths: list[int]) -> dict:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("lengths", [[7, 1, 5], [13], [1, 1, 1]])
def test_documents_of_the_collator(kernel: str, lengths: list[int], scale: float | None) -> None:
    inputs = random_inputs(1, sum(lengths))
    output, weights = varlen.attention(LAYER, *inputs, None, scaling=scale, **collated(lengths))
    assert weights is None
    assert_same(output, expected(inputs, blocks(lengths)[None], scale), inputs)


def test_documents_by_positions_alone(kernel: str) -> None:
    """Two rows, as from a collator without `padding_free`, and one row of positions for both."""
    inputs = random_inputs(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    output, _ = varlen.attention(LAYER, *inputs, None, position_ids=positions)
    assert_same(output, expected(inputs, torch.stack([blocks([3, 5]), blocks([6, 2])])), inputs)
    output, _ = varlen.attention(LAYER, *inputs, None, position_ids=positions[:1])
    assert_same(output, expected(inputs, blocks([3, 5])[None]), inputs)
    output, _ = varlen.attention(LAYER, *inputs, None)
    assert_same(output, expected(inputs, causal(8)[None]), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(kernel: str, side: str) -> None:
    """Rows of 8, 3 and 5 tokens; padding is 0, not NaN."""
    real = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    real = real.flip(1) if side == "left" else real
    inputs = random_inputs(3, 8)
    output, _ = varlen.attention(LAYER, *inputs, real.long())
    allowed = causal(8)[None] & real[:, None, :] | torch.eye(8, dtype=torch.bool)  # each sees itself, or sdpa says NaN
    assert_same(output, expected(inputs, allowed) * real[:, :, None, None], inputs)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_a_cache(kernel: str, queries: int, padded: bool) -> None:
    """The queries are the last of the keys: in generation (1), and when a prompt continues (3)."""
    real = torch.arange(9) >= torch.tensor([0, 4])[:, None]
    inputs = random_inputs(2, queries, 9)
    output, _ = varlen.attention(LAYER, *inputs, real if padded else None)
    allowed = causal(queries, 9)[None].expand(2, -1, -1)
    assert_same(output, expected(inputs, allowed & real[:, None, :] if padded else allowed), inputs)


def test_a_sliding_window(kernel: str) -> None:
    """A window of 4 keys, including the query's own. One longer than any document is ignored, for any torch."""
    lengths = [9, 3]
    inputs = random_inputs(1, 12)
    call = lambda window: varlen.attention(LAYER, *inputs, None, sliding_window=window, **collated(lengths))[0]  # noqa: E731
    assert_same(call(9), expected(inputs, blocks(lengths)[None]), inputs)
    if kernel == "2.10":
        with pytest.raises(ValueError, match="not support a sliding window with torch"):
            call(4)
        return
    assert_same(call(4), expected(inputs, blocks(lengths)[None] & ~causal(12).tril(-4)), inputs)


def test_both_ways(kernel: str) -> None:
    inputs = random_inputs(1, 6)
    output, _ = varlen.attention(LAYER, *inputs, None, is_causal=False, **collated([2, 4]))
    both = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    assert_same(output, expected(inputs, both[None]), inputs)


def test_smaller_values(kernel: str) -> None:
    inputs = random_inputs(1, 6, value_size=10)
    output, _ = varlen.attention(LAYER, *inputs, None, **collated([2, 4]))
    assert output.shape == (1, 6, HEADS, 10)
    assert_same(output, expected(inputs, blocks([2, 4])[None]), inputs)


@pytest.mark.parametrize(
    ("settings_of_case", "word"),
    [({"dropout": 0.1}, "dropout"), ({"softcap": 30.0}, "soft-capping"), ({"s_aux": torch.ones(HEADS)}, "sinks")],
)
def test_unsupported_features_of_the_kernel_are_errors(settings_of_case: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        varlen.attention(LAYER, *random_inputs(1, 4), None, **settings_of_case)
    with pytest.raises(ValueError, match="padding mask"):
        varlen.attention(LAYER, *random_inputs(1, 4), torch.zeros(1, 1, 4, 4))


def test_a_complete_model_gives_the_logits_of_sdpa(kernel: str, tiny_model: Path) -> None:
    """Packed by TRL's collator, padded, and generating with a cache from left-padded prompts; selected by its name."""
    varlen.register()
    models = [LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation=name) for name in (varlen.NAME, "sdpa")]
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    lengths = [11, 20, 9]
    rows = [{"input_ids": row.tolist()} for row in ids[0].split(lengths)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert batch.pop("labels").shape == ids.shape
    packed = [model(**batch, use_cache=False).logits for model in models]
    torch.testing.assert_close(*packed, rtol=1e-4, atol=1e-4)
    for tensor, other in zip(
        *(
            torch.autograd.grad(logits.square().mean(), list(model.parameters()))
            for logits, model in zip(packed, models, strict=True)
        ),
        strict=True,
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    rows = ids.view(2, 20)
    mask = (torch.arange(20) >= torch.tensor([0, 6])[:, None]).long()
    logits = [model(rows, attention_mask=mask, use_cache=False).logits[mask.bool()] for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    answers = [
        model.generate(rows, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for model in models
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("kernel", VERSIONS, indirect=True)
@pytest.mark.parametrize("selective", [True, False])
def test_selective_checkpointing_keeps_the_output_of_attention(kernel: str, selective: bool, tiny_model: Path) -> None:
    """With TRL's, the kernel runs once per layer, without it once more, and the gradients are bitwise equal."""
    varlen.register()
    model = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation=varlen.NAME).train()
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in False, True:
        if checkpointing and selective:
            enable_selective_activation_checkpointing(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        RUNS.clear()
        model.zero_grad()
        model(ids, use_cache=False, **collated([15, 25])).logits.square().mean().backward()
        gradients.append([tensor.grad for tensor in model.parameters()])
    assert (RUNS["forward"], RUNS["backward"]) == (2 if selective else 4, 2)
    assert all(torch.equal(tensor, other) for tensor, other in zip(*gradients, strict=True))


def test_float32_weights_under_autocast(kernel: str, tiny_model: Path) -> None:
    """RoPE returns queries and keys in float32, and values are in 16 bits; FlashAttention has no float32."""
    varlen.register()
    model = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation=varlen.NAME)
    seen = []
    inner = varlen.flash_varlen
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(
            varlen, "flash_varlen", lambda query, *rest, **how: seen.append(query.dtype) or inner(query, *rest, **how)
        )
        logits = model(torch.arange(3, 43)[None], use_cache=False).logits
    assert seen == [torch.bfloat16] * 2
    assert logits.isfinite().all()


def test_this_torch_has_a_kernel_we_know_how_to_call() -> None:
    takes = varlen.kernel_parameters()
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= takes
    assert {"scale", "window_size"} <= takes or "is_causal" in takes


def test_shapes_are_known_to_the_compiler() -> None:
    """torch.compile traces this torch's operators with fake tensors, forward and backward."""
    with FakeTensorMode():
        inputs = [
            torch.empty(1, heads, 12, SIZE).bfloat16().requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]
        borders = torch.empty(3, dtype=torch.int32)
        documents = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 8, "max_length_k": 8}
        output, _ = varlen.attention(LAYER, *inputs, None, **documents)
        assert output.shape == (1, 12, HEADS, SIZE)
        for tensor, other in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
            assert tensor.shape == other.shape


def run_trial(kernel: str, **settings_of_case) -> str | None:
    settings = {
        "head_size": 32,
        "groups": 2,
        "dtype": torch.bfloat16,
        "window": None,
        "softcap": None,
        "device": torch.device("cpu"),
    }
    return check_kernel(kernel, **(settings | settings_of_case))


@pytest.mark.parametrize("window", [None, 4096])
def test_the_kernel_test_accepts_a_plain_loop(kernel: str, window: int | None) -> None:
    """The global random state doesn't change either."""
    varlen.register()
    state = torch.get_rng_state()
    failure = run_trial(varlen.NAME, window=window)
    assert failure is None if window is None or kernel != "2.10" else "sliding window" in failure
    assert torch.equal(torch.get_rng_state(), state)


def test_the_kernel_test_detects_a_leak_and_a_missing_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(module, query, key, value, attention_mask, **kwargs):
        return AttentionInterface()["sdpa"](module, query, key, value, None)

    def forward_only(module, query, key, value, attention_mask, **kwargs):
        raise RuntimeError("this build does not support backward\nmore")

    monkeypatch.setitem(AttentionInterface._global_mapping, "leaking", leaking)
    monkeypatch.setitem(AttentionInterface._global_mapping, "forward_only", forward_only)
    assert "output on packed documents is off" in run_trial("leaking")
    assert run_trial("forward_only") == "this build does not support backward"
