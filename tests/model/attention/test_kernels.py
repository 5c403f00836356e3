"""Attention kernels against float32, forward and backward: head sizes, GQA, windows, soft-capping, sinks, borders.

The same tests run on a CPU with the kernels that it has: sdpa, also by document, the eager attention of models, and
torch_varlen with a stand-in for torch's kernel. On a GPU they run each kernel that is installed or in the hub's cache.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import make_trainer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, eager_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from varlen_kernels import stand_in_kernel

from train.model.attention import kernel_test
from train.model.attention import torch_varlen as varlen
from train.model.attention.kernel_test import check_kernel
from train.model.attention.limits import DISTRIBUTIONS, HUB_KERNELS, ROCM_HUB_KERNELS, Machine, Needs, objection
from train.model.attention.selection import attention_needs, machine
from train.model.load import load_config
from train.recipe import load_recipe

EAGER = "eager_of_models"
HERE = (varlen.NAME, varlen.BY_DOCUMENT, "sdpa", EAGER)
if torch.cuda.is_available():
    HERE += ("flex_attention", *DISTRIBUTIONS, *HUB_KERNELS.values(), *ROCM_HUB_KERNELS.values())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HOPPER = Machine((9, 0), frozenset())
kernels = pytest.mark.parametrize("kernel", HERE)
kernels_but_flex = pytest.mark.parametrize("kernel", [kernel for kernel in HERE if kernel != "flex_attention"])
"""flex_attention is compiled for each shape, which takes seconds; `auto` takes it for soft-capping and sinks only."""


def eager(module, query, key, value, mask, *, s_aux=None, **options: Any) -> Any:
    """Compute attention with the eager code of Gemma-2, or of gpt-oss if there are sinks."""
    if s_aux is None:
        return modeling_gemma2.eager_attention_forward(module, query, key, value, mask, **options)
    layer = SimpleNamespace(sinks=s_aux, num_key_value_groups=module.num_key_value_groups, training=True)
    return modeling_gpt_oss.eager_attention_forward(layer, query, key, value, mask, **options)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register eager attention, and torch_varlen: torch's on CUDA, else a loop."""
    varlen.register()
    monkeypatch.setitem(AttentionInterface._global_mapping, EAGER, eager)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, EAGER, eager_mask)
    if DEVICE == "cpu":
        monkeypatch.setattr(varlen, "KERNEL", stand_in_kernel("2.13"))


def assert_right(kernel: str, *, head_size: int = 64, groups: int = 2, **options: Any) -> None:
    """Compare the kernel with float32, or skip with the reason why it can't compute this.

    On a CPU the kernels compute in float32, which is faster there, under the limits that they have on a Hopper.
    """
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    features = {name: options.get(key) for name, key in (("sliding_window", "window"), ("softcap", "softcap"))}
    sinks = options.get("sinks", False)
    needs = Needs(head_size=head_size, dtype="bfloat16", groups=groups, sinks=sinks, sdpa=not sinks, **features)
    reason = objection(kernel, needs, machine() if DEVICE == "cuda" else HOPPER) if kernel != EAGER else None
    if reason:
        pytest.skip(f"{kernel} {reason}")
    settings = {"dtype": dtype, "window": None, "softcap": None, "device": torch.device(DEVICE)} | options
    assert check_kernel(kernel, head_size=head_size, groups=groups, **settings) is None


@kernels_but_flex
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_head_sizes(kernel: str, head_size: int) -> None:
    assert_right(kernel, head_size=head_size)


@kernels_but_flex
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_query_heads_that_share_keys(kernel: str, groups: int) -> None:
    assert_right(kernel, groups=groups)


@kernels
@pytest.mark.parametrize(("head_size", "softcap"), [(128, None), (128, 50.0), (256, 50.0)])
@pytest.mark.parametrize("window", [None, 4096])
def test_windows_and_soft_capping(kernel: str, head_size: int, softcap: float | None, window) -> None:
    assert_right(kernel, head_size=head_size, softcap=softcap, window=window)


@kernels
@pytest.mark.parametrize("window", [None, 128])
def test_attention_sinks(kernel: str, window: int | None) -> None:
    """As gpt-oss has them: heads of 64, eight for each key head, half of the layers with a window."""
    assert_right(kernel, groups=8, sinks=True, window=window)


@kernels
@pytest.mark.parametrize(
    "documents",
    [(1,), (1, 1, 1), (1, 127, 128, 129), (1023, 1), (16,) * 24],
    ids=["one token", "single tokens", "around a block", "long, then one token", "many"],
)
def test_borders_of_documents(kernel: str, documents: tuple[int, ...]) -> None:
    assert_right(kernel, documents=documents)


@kernels_but_flex
def test_float16(kernel: str) -> None:
    assert_right(kernel, dtype=torch.float16)


def without(feature: str) -> Any:
    """Return eager attention that ignores a feature."""
    return lambda *inputs, **options: eager(*inputs, **(options | {feature: None}))


SETTINGS = {"head_size": 64, "groups": 2, "dtype": torch.float32, "device": torch.device("cpu")}


def test_a_kernel_that_ignores_soft_capping_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Gemma-2's own 50 the scores of random numbers change by less than bfloat16 rounds."""
    monkeypatch.setitem(AttentionInterface._global_mapping, EAGER, without("softcap"))
    assert check_kernel(EAGER, window=None, softcap=None, **SETTINGS) is None
    assert "its output on packed documents is off by" in check_kernel(EAGER, window=None, softcap=50.0, **SETTINGS)


def test_a_kernel_that_ignores_sinks_or_their_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = SETTINGS | {"window": None, "softcap": None, "sinks": True}
    monkeypatch.setitem(AttentionInterface._global_mapping, EAGER, without("s_aux"))
    assert "appears to not have been used in the graph" in check_kernel(EAGER, **sinks)
    wrong = lambda *inputs, s_aux, **options: eager(*inputs, s_aux=s_aux - 2 * (s_aux - s_aux.detach()), **options)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, EAGER, wrong)
    assert check_kernel(EAGER, **sinks) == "its dsink on packed documents is off by 200%"


def test_a_kernel_that_ignores_the_window_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_test, "create_sliding_window_causal_mask", create_causal_mask)
    assert "its output on packed documents is off by" in check_kernel("sdpa", window=4096, softcap=None, **SETTINGS)


@pytest.mark.parametrize("kernel", [kernel for kernel in HERE if kernel != varlen.NAME or DEVICE == "cuda"])
def test_a_run_with_the_kernel(
    kernel: str, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Selection, loading, the isolation test on the model, and a step of training."""
    settings = {"num_train_epochs": ..., "max_steps": 1, "bf16": True}
    name = "eager" if kernel == EAGER else kernel
    recipe = load_recipe(recipe_file(model={"attention": name}, training=settings))
    if reason := objection(name, attention_needs(recipe, load_config(recipe.model)), machine()):
        pytest.skip(f"{name} {reason}")
    trainer = make_trainer(recipe)
    trainer.train()
    assert trainer.model.config._attn_implementation == name
    assert "packed documents are isolated" in capsys.readouterr().out
