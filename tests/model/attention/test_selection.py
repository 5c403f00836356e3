"""The kernel that `auto` selects, its reasons against the others, and kernels refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from train.errors import UserError
from train.model.attention.selection import Machine, Needs, attention_needs, choose_attention, select_attention
from train.recipe import load_recipe

A100, HOPPER, BLACKWELL, CPU = (8, 0), (9, 0), (10, 0), None
ALL = frozenset({"flash_attention_2", "flash_attention_3", "flash_attention_4"})
LLAMA = Needs(head_size=128, dtype="bfloat16", groups=4)


def auto(needs: Needs = LLAMA, capability: tuple[int, int] | None = HOPPER, installed=ALL, **machine) -> str:
    return str(choose_attention("auto", needs, Machine(capability, frozenset(installed), **machine)))


def test_the_fastest_first() -> None:
    assert auto() == "flash_attention_3"
    assert auto(capability=BLACKWELL) == "flash_attention_4"
    assert auto(capability=A100) == "flash_attention_2"
    assert auto(installed={"flash_attention_2"}) == (
        "flash_attention_2: flash_attention_3 needs the package flash-attn-3, which is not installed; "
        "flash_attention_4 needs the package flash-attn-4, which is not installed"
    )


def test_without_packages_torchs_own_kernels() -> None:
    chosen = auto(installed=())
    assert chosen.startswith("torch_varlen: ")
    for package in ("flash-attn-3", "flash-attn-4", "flash-attn"):
        assert f"needs the package {package}, which is not installed" in chosen
    assert auto(installed=(), varlen_takes=frozenset()).startswith("sdpa: ")


def test_without_a_gpu() -> None:
    assert auto(capability=CPU) == "sdpa: FlashAttention needs a CUDA device"
    assert auto(replace(LLAMA, softcap=50.0), CPU).startswith("eager: FlashAttention needs a CUDA device; sdpa does no")
    pairs = replace(LLAMA, pairs=True)
    assert auto(pairs, CPU) == "sdpa_by_document: FlashAttention needs a CUDA device"
    assert auto(pairs) == auto()
    for other in {"registered": False}, {"dropout": 0.1}:
        assert auto(replace(pairs, **other), CPU).startswith(
            "sdpa: FlashAttention needs a CUDA device; sdpa_by_documen"
        )


@pytest.mark.parametrize(
    ("needs", "machine", "chosen", "reason"),
    [
        ({"dtype": "float32"}, {}, "sdpa", "in 16 bits, not in float32"),
        ({"head_size": 512}, {}, "sdpa", "head sizes up to 256, not 512"),
        ({}, {"capability": (7, 5)}, "sdpa", "does not run on compute capability 7.5"),
        ({"flash": False}, {}, "sdpa", "not supported by this model's code"),
        ({"flash": False, "sdpa": False}, {}, "flex_attention", "sdpa is not supported by this model's code"),
        ({"flash": False, "sdpa": False, "flex": False}, {}, "eager", "flex_attention is not supported by this model"),
        ({"registered": False}, {}, "sdpa", "torch_varlen is not supported by this model's code"),
        ({"head_size": 100}, {}, "sdpa", "multiples of 8, not 100"),
        ({"softcap": 50.0}, {}, "flex_attention", "torch_varlen does not support soft-capping"),
        ({"dropout": 0.1}, {}, "sdpa", "torch_varlen does not support dropout"),
        ({"sliding_window": 4096}, {}, "torch_varlen", "flash-attn"),
        (
            {"sliding_window": 4096},
            {"varlen_takes": frozenset({"is_causal"})},
            "sdpa",
            "not support a sliding window with torch",
        ),
        ({"head_size": 208}, {"capability": (8, 9)}, "sdpa", "no backward for head size 208"),
        ({"head_size": 208}, {"capability": (8, 0)}, "torch_varlen", "flash-attn"),
    ],
)
def test_limits_of_torchs_own_kernels(needs: dict, machine: dict, chosen: str, reason: str) -> None:
    line = auto(replace(LLAMA, **needs), installed=(), **machine)
    assert line.startswith(f"{chosen}: ")
    assert reason in line


def test_a_kernel_of_the_hub_that_is_cached_and_blocked_is_a_reason() -> None:
    compiled, reason = "kernels-community/flash-attn2", "is in the cache of the hub, but"
    here = Machine(A100, frozenset(), blocked={compiled: reason})
    assert str(choose_attention("auto", LLAMA, here)) == f"torch_varlen: {compiled} {reason}"
    with pytest.raises(UserError, match=f"^model.attention: {compiled} {reason}"):
        choose_attention(compiled, LLAMA, here)


def test_dropout_needs_flash_attention_2() -> None:
    assert auto(replace(LLAMA, dropout=0.1)).startswith("flash_attention_2: ")


def test_a_kernel_that_fails_its_test_is_skipped_or_refused() -> None:
    tried = []

    def failing(kernel: str, needs: Needs) -> str | None:
        tried.append(kernel)
        return "no backward" if kernel == "flash_attention_3" else None

    here = Machine(HOPPER, ALL)
    assert str(choose_attention("auto", LLAMA, here, check=failing)) == (
        "flash_attention_4: flash_attention_3 fails here: no backward"
    )
    assert tried == ["flash_attention_3", "flash_attention_4"]
    with pytest.raises(UserError, match=r"flash_attention_3 fails here: no backward\. Write `auto`"):
        choose_attention("flash_attention_3", LLAMA, here, check=failing)
    tried.clear()
    choose_attention("auto", LLAMA, Machine(CPU, ALL), check=failing)
    choose_attention("sdpa", LLAMA, here, check=failing)
    assert tried == []


@pytest.mark.parametrize(
    ("kernel", "remedy"),
    [
        ("flash_attention_4", "pip install --pre flash-attn-4"),
        ("flash_attention_3", "Write kernels-community/flash-attn3, the same code compiled (`pip install 'kernels>="),
        ("flash_attention_3", "https://github.com/Dao-AILab/flash-attention"),
        ("flash_attention_2", "Write kernels-community/flash-attn2, the same code compiled (`pip install 'kernels>="),
        ("flash_attention_2", "pip install flash-attn --no-build-isolation"),
        ("torch_varlen", "pip install 'torch>=2.10'"),
    ],
)
def test_a_missing_kernel_by_name(kernel: str, remedy: str) -> None:
    with pytest.raises(UserError) as refusal:
        choose_attention(kernel, LLAMA, Machine(HOPPER, frozenset(), frozenset()))
    assert str(refusal.value).startswith(f"model.attention: {kernel} needs ")
    assert remedy in str(refusal.value)
    assert str(refusal.value).endswith("or write `auto`.")


@pytest.mark.parametrize(
    ("kernel", "needs", "capability", "words"),
    [
        ("torch_varlen", LLAMA, CPU, "needs a CUDA device"),
        ("flex_attention", LLAMA, CPU, "needs a CUDA device"),
        ("flex_attention", replace(LLAMA, dropout=0.1), HOPPER, "attention_dropout is 0.1"),
        ("sdpa", replace(LLAMA, softcap=50.0), HOPPER, "not support soft-capping"),
        ("torch_varlen", replace(LLAMA, dtype="float32"), HOPPER, "in 16 bits"),
    ],
)
def test_a_kernel_by_name_that_does_not_support_the_model(kernel: str, needs: Needs, capability, words: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.attention: {kernel} .*{words}.* Write `auto`\.$"):
        choose_attention(kernel, needs, Machine(capability, ALL))


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention", "torch_varlen", "flash_attention_2"])
def test_a_kernel_by_name_is_taken(kernel: str) -> None:
    assert str(choose_attention(kernel, LLAMA, Machine(HOPPER, ALL))) == kernel


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, dtype="float16"),
            Needs(head_size=16, dtype="float32", groups=2),
        ),
        (
            transformers.MistralConfig(
                head_dim=128, num_attention_heads=32, num_key_value_heads=8, sliding_window=4096
            ),
            Needs(head_size=128, dtype="float32", groups=4, sliding_window=4096),
        ),
        (
            transformers.Qwen2Config(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=4, attention_dropout=0.1
            ),
            Needs(head_size=16, dtype="float32", dropout=0.1),
        ),
        (
            transformers.Gemma2Config(head_dim=256, num_attention_heads=8, num_key_value_heads=4, sliding_window=4096),
            Needs(head_size=256, dtype="float32", groups=2, sliding_window=4096, softcap=50.0, sdpa=False),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_requirements_of_a_model(config, expected: Needs, recipe_file: Callable[..., Path]) -> None:
    assert attention_needs(load_recipe(recipe_file()), config) == expected


@pytest.mark.parametrize(
    ("dtype", "training", "expected"),
    [
        ("float32", {"bf16": False}, "float32"),
        ("float32", {"bf16": True}, "bfloat16"),  # under autocast
        ("float32", {"bf16": ...}, "bfloat16"),  # TRL's default
        ("float32", {"bf16": False, "fp16": True}, "float16"),
        ("bfloat16", {"bf16": False}, "bfloat16"),
        ("auto", {"bf16": False}, "float16"),
    ],
)
def test_the_dtype_of_attention(dtype: str, training: dict, expected: str, recipe_file: Callable[..., Path]) -> None:
    recipe = load_recipe(recipe_file(model={"dtype": dtype}, training=training))
    assert attention_needs(recipe, transformers.LlamaConfig(dtype="float16")).dtype == expected


def test_attention_sinks_leave_the_kernels_that_the_model_allows(recipe_file: Callable[..., Path]) -> None:
    """transformers would replace another FlashAttention by the first on gpt-oss's list, which has no backward."""
    needs = attention_needs(load_recipe(recipe_file(training={"bf16": True})), transformers.GptOssConfig())
    assert needs.sinks
    assert "flash_attention_4" in needs.only
    assert auto(needs).startswith(
        "flash_attention_4: flash_attention_3 is not among the kernels that this model's code"
    )
    assert auto(needs, installed=ALL - {"flash_attention_4"}).startswith("flex_attention: ")
    with pytest.raises(UserError, match=r"kernels-community/flash-attn3 is not among the kernels .* Write `auto`"):
        choose_attention(
            "kernels-community/flash-attn3", needs, Machine(HOPPER, ALL | {"kernels-community/flash-attn3"})
        )


def test_requirements_of_a_model_with_its_own_code(recipe_file: Callable[..., Path]) -> None:
    """Nothing is known of its support: `auto` chooses sdpa, and a kernel by name is used as chosen."""
    config = type("ForeignConfig", (transformers.PretrainedConfig,), {"hidden_size": 64, "num_attention_heads": 4})()
    sixteen = {"bf16": True}
    assert auto(attention_needs(load_recipe(recipe_file(training=sixteen)), config)).startswith("sdpa: ")
    by_name = load_recipe(recipe_file(model={"attention": "flash_attention_2"}, training=sixteen))
    assert (
        choose_attention("flash_attention_2", attention_needs(by_name, config), Machine(HOPPER, ALL)).kernel
        == "flash_attention_2"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice on a CPU")
def test_pairs_on_a_cpu(recipe_file: Callable[..., Path]) -> None:
    choices = [
        select_attention(load_recipe(recipe_file(**sections)), transformers.LlamaConfig()).kernel
        for sections in ({}, {"preference": {"loss": "dpo"}})
    ]
    assert choices == ["sdpa", "sdpa_by_document"]


def test_the_start_screen_shows_the_kernel_and_the_reasons(recipe_file: Callable[..., Path], capsys) -> None:
    from train.sft import main

    assert main(["--recipe", str(recipe_file(training={"num_train_epochs": ..., "max_steps": 1}))]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("attention ")]
    if not torch.cuda.is_available():
        assert line == "attention   sdpa: FlashAttention needs a CUDA device"
