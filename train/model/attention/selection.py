"""Selection of the attention kernel of a run, with the reasons against faster ones."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.integrations.hub_kernels import is_kernel

from train.errors import MachineError, UserError
from train.model.attention import torch_varlen as varlen
from train.model.attention.kernel_test import check_kernel
from train.model.attention.limits import (
    DISTRIBUTIONS,
    HUB_KERNELS,
    ROCM_HUB_KERNELS,
    Machine,
    Needs,
    machine_objection,
    missing,
    model_objection,
    objection,
)
from train.model.hub_kernels import PACKAGE, is_cached, is_trusted, parse_hub_kernel, remedy, unavailable_reason
from train.recipe import Recipe

__all__ = ["AttentionChoice", "Machine", "Needs", "attention_needs", "choose_attention", "machine", "select_attention"]

_INSTALL = {
    "flash_attention_4": "Install it with `pip install --pre flash-attn-4`",
    "flash_attention_3": "build it from the folder hopper of https://github.com/Dao-AILab/flash-attention",
    "flash_attention_2": "build it with `pip install flash-attn --no-build-isolation`",
    varlen.NAME: "Install it with `pip install 'torch>=2.10'`",
}
_FASTEST_FIRST = {
    # flash-attention-3 was written for Hopper (arXiv:2407.08608): 740 of 990 TFLOP/s, 1.5 to 2 times its predecessor.
    # Version 4 is as fast there (ecmwf/anemoi-core#959, H100, forward and backward: 74.3 and 74.1 ms, version 2 142.3),
    # but not yet for variable lengths (pytorch/torchtitan#4413), nor for head size 256 (flash-attention#2878).
    9: ("flash_attention_3", "flash_attention_4", "flash_attention_2"),
    # "FlashAttention-4 is ... for Hopper and Blackwell GPUs" (its README): those of data centres, 10.x and 11.x.
    10: ("flash_attention_4", "flash_attention_2"),
    11: ("flash_attention_4", "flash_attention_2"),
    # 12.x has the instructions of 8.0; version 4's kernels for it are still being completed (flash-attention#2634).
    12: ("flash_attention_2", "flash_attention_4"),
}
"""FlashAttention by the major number of the compute capability; others have version 2 only. Not measured by us."""


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel, by its name in transformers, and the reasons against each faster one."""

    kernel: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the line of the start screen."""
        return ": ".join(filter(None, (self.kernel, "; ".join(self.reasons))))

    @property
    def load_arguments(self) -> dict[str, object]:
        """Arguments of `from_pretrained`; a kernel of another publisher is one that the recipe trusts."""
        foreign = is_kernel(self.kernel) and not is_trusted(self.kernel)
        return {"attn_implementation": self.kernel, **({"allow_all_kernels": True} if foreign else {})}


def select_attention(recipe: Recipe, config: PretrainedConfig) -> AttentionChoice:
    """Select the kernel for a recipe and a model's `config`, and test it on a CUDA device. Raises UserError."""
    needs = replace(attention_needs(recipe, config), pairs=recipe.preference is not None)
    return choose_attention(recipe.model.attention, needs, machine(), check=_check_once)


def attention_needs(recipe: Recipe, config: PretrainedConfig) -> Needs:
    """Return the requirements of `recipe` and the model's `config` on attention."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1  # some models have no attention at all
    heads = max(heads) if isinstance(heads, list) else heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if getattr(text, "qk_nope_head_dim", None):  # multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)
        size = text.qk_nope_head_dim + text.qk_rope_head_dim
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    trusted = (
        architecture is None and recipe.model.attention != "auto"
    )  # code that comes with a model: the user knows it
    shared_heads = getattr(text, "num_key_value_heads", None)
    only = getattr(architecture, "_compatible_flash_implementations", None)
    return Needs(
        head_size=size,
        dtype=_dtype(recipe, config),
        groups=heads // shared_heads if isinstance(shared_heads, int) and shared_heads else 1,
        sliding_window=getattr(text, "sliding_window", None),
        softcap=getattr(text, "attn_logit_softcapping", None),
        sinks=only is not None,  # in transformers 5.23 the models with such a list, because most kernels have no sinks
        dropout=getattr(text, "attention_dropout", 0.0) or 0.0,
        only=None if only is None else tuple(only),
        trust_remote_code=recipe.model.trust_remote_code,
        flash=bool(getattr(architecture, "_supports_flash_attn", trusted)),
        registered=bool(getattr(architecture, "_supports_attention_backend", trusted)),
        flex=bool(getattr(architecture, "_supports_flex_attn", trusted)),
        sdpa=bool(getattr(architecture, "_supports_sdpa", True)),
    )


def _dtype(recipe: Recipe, config: PretrainedConfig) -> str:
    training = recipe.training
    if training.get("fp16"):
        return "float16"
    if training.get("bf16", True):  # TRL's own default
        return "bfloat16"
    saved = str(config.dtype or "float32").removeprefix("torch.")
    return saved if recipe.model.dtype == "auto" else recipe.model.dtype


@cache
def machine() -> Machine:
    """Return the capabilities of this process, detected once."""
    capability = None
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        capability = torch.cuda.get_device_capability(device)
    installed = {kernel for kernel, distribution in DISTRIBUTIONS.items() if _is_installed(distribution)}
    in_hub = {name: parse_hub_kernel(name) for name in (*HUB_KERNELS.values(), *ROCM_HUB_KERNELS.values())}
    cached = {name: unavailable_reason(kernel) for name, kernel in in_hub.items() if is_cached(kernel)}
    return Machine(
        capability,
        frozenset(installed | {name for name, reason in cached.items() if reason is None}),
        varlen.kernel_parameters(),
        {name: reason for name, reason in cached.items() if reason is not None},
        rocm=torch.version.hip is not None,
    )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def _check_once(kernel: str, needs: Needs) -> str | None:
    return check_kernel(
        kernel,
        head_size=needs.head_size,
        groups=needs.groups,
        dtype=getattr(torch, needs.dtype),
        window=needs.sliding_window,
        softcap=needs.softcap,
        sinks=needs.sinks,
        device=torch.device("cuda", torch.cuda.current_device()),
    )


def choose_attention(
    choice: str, needs: Needs, here: Machine, *, check: Callable[[str, Needs], str | None] | None = None
) -> AttentionChoice:
    """Choose the kernel for `model.attention: choice` and register it with transformers.

    `auto` takes the first of these that supports the model on this machine; all keep packed documents apart:

    1. the versions of FlashAttention for this device, the fastest first: each as an installed package, else as a kernel
       of the hub where that is in the cache (nothing is downloaded);
    2. torch's own FlashAttention kernels for variable lengths;
    3. PyTorch's scaled-dot-product attention; for pairs on a CPU over one document after the other;
    4. for scores that it can't compute (soft-capping, attention sinks) flex_attention, which has to be compiled, or
       eager attention without a CUDA device.

    `check` runs a kernel and returns an error, or None. Without it, and without a CUDA device, no kernel is run.
    Raises UserError for a kernel chosen by name that can't be used, with what to install or to write instead; it is a
    MachineError if the kernel may be used on another machine.
    """
    varlen.register()

    def failure_of(kernel: str) -> str | None:
        if check is None or here.capability is None or not (kernel in _INSTALL or is_kernel(kernel)):
            return None
        failure = check(kernel, needs)
        return f"fails here: {failure}" if failure else None

    if choice != "auto":
        if reason := model_objection(choice, needs):
            untrusted = is_kernel(choice) and not is_trusted(choice) and not needs.trust_remote_code
            remedy = (
                "Read it; if you trust it, write `model.trust_remote_code: true` too, or write"
                if untrusted
                else "Write"
            )
            raise UserError(f"model.attention: {choice} {reason}. {remedy} `auto`.")
        if reason := machine_objection(choice, needs, here) or failure_of(choice):
            raise MachineError(f"model.attention: {choice} {reason}", f"{_remedy(choice, here)} `auto`.")
        return AttentionChoice(choice)
    order, reasons = [*_flash_kernels(here), varlen.NAME, "sdpa", "flex_attention"], []
    if here.capability is None:
        order, reasons = ["sdpa"], ["FlashAttention needs a CUDA device"]
        if needs.pairs:  # runs without pairs keep the losses that they had before it, to the bit
            order.insert(0, varlen.BY_DOCUMENT)
    for kernel in order:
        reason = objection(kernel, needs, here) or failure_of(kernel)
        if reason is None:
            return AttentionChoice(kernel, tuple(reasons))
        reasons.append(f"{kernel} {reason}")
    return AttentionChoice("eager", tuple(reasons))


def _flash_kernels(here: Machine) -> Iterator[str]:
    """Yield the FlashAttention kernels for this device, the fastest first: packages, and what the cache has of the hub.

    flash-attn for AMD's GPUs is ROCm's (its composable-kernel and Triton backends are part of the package since 2.7);
    there is no version 3 or 4 of it.
    """
    major = here.capability[0] if here.capability and not here.rocm else 0
    in_hub = ROCM_HUB_KERNELS if here.rocm else HUB_KERNELS
    for version in _FASTEST_FIRST.get(major, ("flash_attention_2",)):
        compiled = in_hub[version]
        in_cache = compiled in here.installed or compiled in here.blocked
        if version in here.installed or not in_cache:
            yield version
        if in_cache:
            yield compiled


def _remedy(choice: str, here: Machine) -> str:
    """Return the beginning of a sentence that ends with what to write instead."""
    if not (is_kernel(choice) or choice in _INSTALL) or not missing(choice, here):
        return "Write"
    if is_kernel(choice):
        return f"{remedy(parse_hub_kernel(choice))}, or write"
    compiled = (ROCM_HUB_KERNELS if here.rocm else HUB_KERNELS).get(choice)
    if choice == "flash_attention_4" or compiled is None:
        return f"{_INSTALL[choice]}, or write"
    return f"Write {compiled}, the same code compiled (`pip install '{PACKAGE}'`), {_INSTALL[choice]}, or write"
