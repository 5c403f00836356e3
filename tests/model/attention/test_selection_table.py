"""Kernel that `auto` selects: GPU x installed packages x model, as a table.

Its entries come from the kernels' documentation, read independently of train/model/attention/limits.py:

- FlashAttention 2 (flash-attention's README): "Ampere, Ada, or Hopper GPUs", "all head dimensions up to 256", "head dim
  > 192 backward requires A100/A800 or H100/H800 ... head dim 256 backward now works on consumer GPUs (if there's no
  dropout) as of flash-attn 2.5.5", "sliding window", "softcapping". setup.py of 2.8 also builds for 10.0 and 12.0.
- FlashAttention 3 (README, hopper/): "H100 / H800 GPU"; transformers has no build of it for AMD's GPUs.
- FlashAttention 4 (README, flash_attn/cute): "for Hopper and Blackwell GPUs"; its interface.py: `_flash_attn_bwd` takes
  9.x to 12.x; "SM100 backward with head_dim=256 does not support score_mod" (soft-capping); "score_mod backward not
  supported on SM 12.0".
- torch.nn.attention.varlen (torch 2.13): FlashAttention 2, so 8.0 and later (sdp_utils.cpp: "[sm80, sm121]"), without
  soft-capping and sinks; on ROCm by AOTriton ("all tests in test/test_varlen_attention.py are enabled", torch#174105).
- FlashAttention 2 on AMD's GPUs: csrc/flash_attn_ck/mha_varlen_fwd.cpp has `const float /*softcap*/`, which it ignores;
  aiter-flash-attn's README: "standard FA2 kwargs ... plus an `s_aux` argument", its backward has windows and sinks
  (kernels-community#1057), and its mha.py no softcap.
- Volta and Turing (7.x) have no FlashAttention in any of them.
- sdpa has neither soft-capping nor sinks; flex_attention has both, and needs a GPU for its backward.
- transformers: FLASH_ATTN_KERNEL_DEVICES (which hub kernel is built for which vendor), and gpt-oss's list of kernels.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, GptOssForCausalLM

from train.model.attention.selection import Machine, Needs, attention_needs, choose_attention
from train.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "model_configs"

GPUS = {
    "A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "B300": (10, 3),
    "RTX 5090": (12, 0), "GB10": (12, 1), "V100": (7, 0), "T4": (7, 5), "MI300X": (9, 4), "CPU": None,
}  # fmt: skip
"""Compute capabilities (developer.nvidia.com/cuda-gpus); for gfx942 torch reports (9, 4). Others are like these: A10,
A40 (8.6), L4, L40S (8.9), H200, GH200 (9.0), GB200 (10.0), GB300 (10.3)."""
FA2, FA3, FA4, VARLEN = "flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen"
HUB2, HUB3, HUB4, AITER = (f"kernels-community/{name}" for name in ("flash-attn2", "flash-attn3", "flash-attn4", "aiter-flash-attn"))  # fmt: skip
PACKAGES = {
    "none": set(),
    "flash-attn": {FA2},
    "flash-attn-3": {FA3},
    "flash-attn-4": {FA4},
    "hub": {HUB2, HUB3, HUB4, AITER},  # the package kernels, with these in the hub's cache
    "all": {FA2, FA3, FA4, HUB2, HUB3, HUB4, AITER},
}
PLAIN = Needs(head_size=128, dtype="bfloat16", groups=4)
MODELS = {
    "Mistral-7B-v0.2": PLAIN,  # Llama-3, Phi-4 and Qwen-2.5 have heads of 128 and no window either
    "SmolLM2": replace(PLAIN, head_size=64, groups=3),
    "Phi-2": replace(PLAIN, head_size=80, groups=1),
    "Phi-3-mini": replace(PLAIN, head_size=96, groups=1, sliding_window=2047),
    "Gemma-2": replace(PLAIN, head_size=256, groups=2, sliding_window=4096, softcap=50.0, sdpa=False),
    "Gemma-3": replace(PLAIN, head_size=256, groups=2, sliding_window=1024),
    "gpt-oss": replace(
        PLAIN, head_size=64, groups=8, sliding_window=128, sinks=True, sdpa=False,
        only=tuple(GptOssForCausalLM._compatible_flash_implementations),
    ),
}  # fmt: skip
ORDINARY = ("Mistral-7B-v0.2", "SmolLM2", "Phi-2", "Phi-3-mini")
SDPA, FLEX, EAGER = "sdpa", "flex_attention", "eager"

# model: GPU: the kernel with nothing, flash-attn, flash-attn-3, flash-attn-4, the hub's kernels, all of them
TABLE: dict[tuple[str, ...], dict[tuple[str, ...], tuple[str, str, str, str, str, str]]] = {
    (*ORDINARY, "Gemma-3"): {
        ("A100", "RTX 3090", "RTX 4090"): (VARLEN, FA2, VARLEN, VARLEN, HUB2, FA2),
        ("H100",): (VARLEN, FA2, FA3, FA4, HUB3, FA3),
        ("B200", "B300"): (VARLEN, FA2, VARLEN, FA4, HUB4, FA4),
        ("RTX 5090", "GB10"): (VARLEN, FA2, VARLEN, FA4, HUB2, FA2),
        ("V100", "T4"): (SDPA, SDPA, SDPA, SDPA, SDPA, SDPA),
        ("MI300X",): (VARLEN, FA2, VARLEN, VARLEN, AITER, FA2),
        ("CPU",): (SDPA, SDPA, SDPA, SDPA, SDPA, SDPA),
    },
    ("Gemma-2",): {
        ("A100", "RTX 3090", "RTX 4090"): (FLEX, FA2, FLEX, FLEX, HUB2, FA2),
        ("H100",): (FLEX, FA2, FA3, FA4, HUB3, FA3),
        ("B200", "B300"): (FLEX, FA2, FLEX, FLEX, HUB2, FA2),
        ("RTX 5090", "GB10"): (FLEX, FA2, FLEX, FLEX, HUB2, FA2),
        ("V100", "T4"): (FLEX, FLEX, FLEX, FLEX, FLEX, FLEX),
        ("MI300X",): (FLEX, FLEX, FLEX, FLEX, FLEX, FLEX),
        ("CPU",): (EAGER, EAGER, EAGER, EAGER, EAGER, EAGER),
    },
    ("gpt-oss",): {
        ("A100", "RTX 3090", "RTX 4090"): (FLEX, FLEX, FLEX, FLEX, FLEX, FLEX),
        ("H100", "B200", "B300"): (FLEX, FLEX, FLEX, FA4, FLEX, FA4),
        ("RTX 5090", "GB10"): (FLEX, FLEX, FLEX, FLEX, FLEX, FLEX),
        ("V100", "T4"): (FLEX, FLEX, FLEX, FLEX, FLEX, FLEX),
        ("MI300X",): (FLEX, FLEX, FLEX, FLEX, AITER, AITER),
        ("CPU",): (EAGER, EAGER, EAGER, EAGER, EAGER, EAGER),
    },
}
CASES = [
    (model, gpu, packages, kernel)
    for models, rows in TABLE.items()
    for model in models
    for gpus, kernels in rows.items()
    for gpu in gpus
    for packages, kernel in zip(PACKAGES, kernels, strict=True)
]


@pytest.mark.parametrize(
    ("file", "model", "groups"),
    [
        ("mistral-7b-v0.2", "Mistral-7B-v0.2", 4),
        ("llama-3.1-8b-instruct", "Mistral-7B-v0.2", 4),
        ("llama-3.1-70b", "Mistral-7B-v0.2", 8),
        ("phi-4", "Mistral-7B-v0.2", 4),
        ("qwen2.5-14b-instruct", "Mistral-7B-v0.2", 5),
        ("gemma-2-9b-it", "Gemma-2", 2),
    ],
)
def test_models_of_a_row_need_the_same(file: str, model: str, groups: int, recipe_file: Callable[..., Path]) -> None:
    settings = json.loads((CONFIGS / f"{file}.json").read_bytes())
    config = AutoConfig.for_model(**settings)
    needs = attention_needs(load_recipe(recipe_file(training={"bf16": True})), config)
    assert needs == replace(MODELS[model], groups=groups)


def test_the_table_is_complete() -> None:
    combinations = {(model, gpu, packages) for model, gpu, packages, _ in CASES}
    assert len(CASES) == len(combinations) == len(MODELS) * len(GPUS) * len(PACKAGES)


@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_by_gpu_packages_and_model(gpu: str) -> None:
    """One test per GPU, not one per entry: each takes milliseconds."""
    wrong = []
    for model, packages, kernel in (
        (model, packages, kernel) for model, name, packages, kernel in CASES if name == gpu
    ):
        here = Machine(GPUS[gpu], frozenset(PACKAGES[packages]), rocm=gpu == "MI300X")
        choice = choose_attention("auto", MODELS[model], here)
        if choice.kernel != kernel:
            wrong.append(f"{model} with {packages}: {choice}, not {kernel}")
    assert not wrong


def test_an_mi300_is_no_hopper() -> None:
    """torch reports (9, 4) for it, and calls it `cuda`."""
    mi300 = Machine((9, 4), frozenset({FA3, FA4, HUB2}), rocm=True)
    assert str(choose_attention("auto", PLAIN, mi300)).startswith("torch_varlen: flash_attention_2 needs the package")
    for kernel, reason in ((FA3, "for NVIDIA's GPUs"), (FA4, "for NVIDIA's GPUs"), (HUB2, "no build for an AMD GPU")):
        with pytest.raises(Exception, match=reason):
            choose_attention(kernel, PLAIN, mi300)
    with pytest.raises(Exception, match="no build for an NVIDIA GPU"):
        choose_attention(AITER, PLAIN, Machine((9, 0), frozenset({AITER})))


@pytest.mark.parametrize(
    ("capability", "needs", "kernel"),
    [
        ((10, 0), {"head_size": 192}, VARLEN),  # FlashAttention 4 has 192 on 10.x for (192, 128) only
        ((9, 0), {"head_size": 192}, FA4),
        ((12, 0), {"head_size": 256, "dropout": 0.1}, SDPA),
        ((8, 9), {"head_size": 256, "dropout": 0.1}, SDPA),
        ((8, 0), {"head_size": 256, "dropout": 0.1}, FA2),
        ((9, 0), {"head_size": 100}, FA2),  # which pads it; the others take multiples of 8
    ],
)
def test_head_sizes_that_some_kernels_lack(capability: tuple[int, int], needs: dict, kernel: str) -> None:
    here = Machine(capability, frozenset({FA4} if "dropout" not in needs and needs["head_size"] != 100 else {FA2, FA4}))
    assert choose_attention("auto", replace(PLAIN, **needs), here).kernel == kernel
