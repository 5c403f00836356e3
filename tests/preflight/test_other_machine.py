"""A recipe for another machine: packages and a GPU that this one lacks are notes; what fits on none stays an error."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cached_kernels import without_package

from train.sft import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
NO_GPU = "needs a CUDA device, and there is none"
BFLOAT16 = {"training": {"bf16": True}, "model": {"dtype": "float32"}}


def check(recipe: Path, *arguments: str) -> int:
    return main(["--recipe", str(recipe), "--check", *arguments])


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("model.attention=torch_varlen", f"model.attention: torch_varlen {NO_GPU}"),
        ("model.attention=flash_attention_2", "model.attention: flash_attention_2 needs the package flash-attn, which"),
        pytest.param(
            "model.attention=kernels-community/flash-attn2",
            "model.attention: kernels-community/flash-attn2 needs the package kernels",
            marks=without_package,
        ),
        pytest.param("model.use_kernels=true", "model.use_kernels: it needs the package kernels", marks=without_package),
        ("training.optim=grokadamw", "training.optim: grokadamw needs the package grokadamw, which is not installed"),
        pytest.param(
            "training.use_liger_kernel=true", "training.use_liger_kernel: it needs the package liger-kernel",
            marks=pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed"),
        ),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_a_note(
    override: str, note: str, recipe_file: Callable[..., Path], refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    recipe = recipe_file(**BFLOAT16)
    for _ in range(2):  # the second time from the cache
        assert check(recipe, "--elsewhere", override) == 0
        page = " ".join(capsys.readouterr().out.split())
        assert f"not checked on this machine: {note}" in page
        assert "Write `auto`" not in page
    error = refused("--recipe", recipe, "--check", override)
    assert note in error
    assert error.endswith("For a run on another machine: --check --elsewhere, or --gpus.")
    assert "--elsewhere" not in refused("--recipe", recipe, override)  # it would train here


def test_a_plan_for_other_gpus_is_of_another_machine(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert check(recipe_file(**BFLOAT16), "--gpus", "8x80GB", "model.attention=torch_varlen") == 0
    assert f"torch_varlen {NO_GPU}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention=torch_varlen", "training.bf16=false"], "torch_varlen computes in 16 bits, not in float32."),
        (["model.attention=someone/kernel"], "someone/kernel is code of a publisher other than"),
        (["model.attention=kernels-community/rmsnorm"], "rmsnorm is not an attention kernel that transformers knows"),
        (["model.attention=kernels-community/flash-attn3:foo"], "flash-attn3:foo names the function foo, and"),
        (["model.attention=flex_attention", "model.sequence_parallel=2"], "Write `model.attention: auto`, or write 1."),
    ],
)
def test_what_no_machine_trains_is_an_error(
    overrides: list[str], message: str, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert message in " ".join(
        refused("--recipe", recipe_file(**BFLOAT16), "--check", "--elsewhere", *overrides).split()
    )


def test_the_option_belongs_to_a_check(recipe_file: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit):
        main(["--recipe", str(recipe_file()), "--elsewhere"])
