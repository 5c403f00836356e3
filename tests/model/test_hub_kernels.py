"""Kernels of the hub: names, trust, what is cached, refusals; with the package `kernels` installed, a whole kernel."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cached_kernels import put_in_cache, with_package, without_package
from huggingface_hub import constants
from transformers import LlamaForCausalLM
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_VERSIONS

from train.errors import UserError
from train.model.attention.kernel_test import check_kernel
from train.model.attention.selection import AttentionChoice, Machine, Needs, choose_attention
from train.model.hub_kernels import (
    PACKAGE,
    HubKernel,
    is_cached,
    is_trusted,
    parse_hub_kernel,
    unavailable_reason,
)
from train.recipe import load_recipe

FLASH3, FOREIGN = "kernels-community/flash-attn3", "someone/fast-attention@abc123"
NEEDS = Needs(head_size=64, dtype="bfloat16", groups=2)
HOPPER = Machine((9, 0), frozenset())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (FLASH3, HubKernel(FLASH3, None, FLASH_ATTN_KERNEL_VERSIONS[FLASH3])),
        ("kernels-community/flash-attn2@v3", HubKernel("kernels-community/flash-attn2", "v3", None)),
        ("someone/kernel:attend", HubKernel("someone/kernel", None, 1)),
        ("someone/kernel@main:attend", HubKernel("someone/kernel", "main", None)),
    ],
)
def test_names(name: str, expected: HubKernel, recipe_file: Callable[..., Path]) -> None:
    assert parse_hub_kernel(name) == expected
    assert load_recipe(recipe_file(model={"attention": name})).model.attention == name


@pytest.mark.parametrize(
    "name", ["flash-attn3", "kernels-community/", "a/b/c", "a/b@v1/x", "a b/c", "flash_attention_5"]
)
def test_names_that_are_none(name: str, recipe_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=rf"model\.attention: found '{name}'\. Allowed: auto, .* or text such as"):
        load_recipe(recipe_file(model={"attention": name}))


def test_code_of_other_publishers_needs_the_recipes_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_trusted(FLASH3)
    assert not is_trusted(FOREIGN)
    assert not is_trusted("kernels-community-2/flash-attn3")
    here = Machine((9, 0), frozenset({FOREIGN}))
    with pytest.raises(UserError, match=r"someone/fast-attention@abc123 is code of .* write `model\.trust_remote_code"):
        choose_attention(FOREIGN, NEEDS, here)
    trusting = Needs(head_size=64, dtype="bfloat16", trust_remote_code=True)
    choice = choose_attention(FOREIGN, trusting, here)
    assert choice.load_arguments == {"attn_implementation": FOREIGN, "allow_all_kernels": True}
    assert AttentionChoice(FLASH3).load_arguments == {"attn_implementation": FLASH3}


def test_the_readme_installs_what_transformers_loads() -> None:
    readme = (Path(__file__).parents[2] / "train" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"pip install '{PACKAGE}'" in readme
    assert parse_hub_kernel(FLASH3).download_command in readme


@without_package
def test_without_the_package() -> None:
    assert not is_cached(parse_hub_kernel(FLASH3))
    with pytest.raises(UserError) as refusal:
        choose_attention(FLASH3, NEEDS, HOPPER)
    assert str(refusal.value).startswith(f"model.attention: {FLASH3} needs the package kernels>=0.")
    assert "`pip install 'kernels>=0." in str(refusal.value)
    assert str(refusal.value).endswith("or write `auto`.")


SOURCE = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                           causal=False):
    borders, documents = cu_seqlens_q.tolist(), []
    for start, end in zip(borders, borders[1:]):
        states = (states[start:end].transpose(0, 1)[None] for states in (q, k, v))
        output = scaled_dot_product_attention(*states, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        documents.append(output[0].transpose(0, 1))
    return torch.cat(documents)

flash_attn_func = flash_attn_with_kvcache = None
"""


@with_package
@pytest.mark.parametrize("name", ["kernels-community/flash-attn2", FOREIGN])
def test_a_cached_kernel_is_tested_and_trains(name: str, tmp_path: Path, tiny_model: Path, monkeypatch) -> None:
    """Without a connection: before it is in the cache it is refused with the command that downloads it."""
    kernel = parse_hub_kernel(name)
    here = Machine((9, 0), frozenset())
    trusting = Needs(head_size=64, dtype="bfloat16", groups=2, trust_remote_code=True)
    with pytest.raises(UserError, match=r"not in the cache .* HF_HUB_OFFLINE is set\. Download it .*install_kernel\("):
        choose_attention(name, trusting, here)
    put_in_cache(tmp_path, monkeypatch, kernel, SOURCE)
    assert is_cached(kernel)
    assert unavailable_reason(kernel) is None
    with monkeypatch.context() as patch:  # the package asks for the publisher before it looks into the cache
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", "https://hub.invalid")
        with pytest.raises(
            UserError, match=r"hub\.invalid can't be resolved .*\. Set HF_HUB_OFFLINE=1 in the environment"
        ):
            choose_attention(name, trusting, here)
    settings = {"head_size": 64, "groups": 2, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    assert check_kernel(name, window=None, softcap=None, **settings) is None
    assert "does not support `softcap`" in check_kernel(name, window=None, softcap=30.0, **settings)
    assert "is off by" in check_kernel(name, window=4096, softcap=None, **settings)

    arguments = choose_attention(name, trusting, here).load_arguments
    models = [LlamaForCausalLM.from_pretrained(tiny_model, **kwargs) for kwargs in (arguments, {"attn_implementation": "eager"})]  # fmt: skip
    ids, positions = torch.randint(3, 200, (1, 20)), torch.cat([torch.arange(12), torch.arange(8)])[None]
    borders = torch.tensor([0, 12, 20], dtype=torch.int32)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 12, "max_length_k": 12}
    logits = models[0](ids, position_ids=positions, use_cache=False, **packed).logits
    torch.testing.assert_close(logits, models[1](ids, position_ids=positions, use_cache=False).logits, rtol=1e-4, atol=1e-4)  # fmt: skip
