"""Selection of the attention kernel of a run, with the reasons against faster ones."""

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from train.errors import UserError
from train.model.attention import torch_varlen as varlen
from train.model.attention.kernel_test import check_kernel
from train.recipe import Recipe

_DISTRIBUTIONS = {  # keys: transformers' names
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_2": "flash-attn",
}
_INSTALL = {  # FlashAttention, the newest first: it skips what other kernels compute and mask
    "flash_attention_4": "Install it with `pip install --pre flash-attn-4`",
    "flash_attention_3": "Build it from the folder hopper of https://github.com/Dao-AILab/flash-attention",
    "flash_attention_2": "Install it with `pip install flash-attn --no-build-isolation`",
    varlen.NAME: "Install it with `pip install 'torch>=2.10'`",
}


@dataclass(frozen=True)
class Needs:
    """Requirements of a model and its recipe on an attention kernel."""

    head_size: int
    dtype: str
    """Type of queries, keys and values: under autocast not that of the weights."""
    groups: int = 1
    """Query heads per key-value head."""
    sliding_window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    flash: bool = True
    """Support of FlashAttention by the architecture's code in transformers; so for the three below."""
    registered: bool = True
    """Use of transformers' AttentionInterface, where torch_varlen is registered; other code ignores it."""
    flex: bool = True
    sdpa: bool = True


@dataclass(frozen=True)
class Machine:
    """Capabilities of this process."""

    capability: tuple[int, int] | None
    """CUDA's compute capability, (9, 0) for an H100; None without a CUDA device."""
    installed: frozenset[str]
    """Kernels whose package is installed."""
    varlen_takes: frozenset[str] = frozenset({"scale", "window_size"})
    """Parameters of torch's own kernel for variable lengths; empty = this torch has no such kernel."""


@dataclass(frozen=True)
class AttentionChoice:
    """A kernel, by its name in transformers, and the reasons against each faster one."""

    kernel: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the line of the start screen."""
        return ": ".join(filter(None, (self.kernel, "; ".join(self.reasons))))


def select_attention(recipe: Recipe, config: PretrainedConfig) -> AttentionChoice:
    """Select the kernel for a recipe and a model's `config`, and test it on a CUDA device. Raises UserError."""
    return choose_attention(recipe.model.attention, attention_needs(recipe, config), machine(), check=_check_once)


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
    only_flash = getattr(architecture, "_compatible_flash_implementations", None)
    return Needs(
        head_size=size,
        dtype=_dtype(recipe, config),
        groups=heads // shared_heads if isinstance(shared_heads, int) and shared_heads else 1,
        sliding_window=getattr(text, "sliding_window", None),
        softcap=getattr(text, "attn_logit_softcapping", None),
        dropout=getattr(text, "attention_dropout", 0.0) or 0.0,
        flash=bool(getattr(architecture, "_supports_flash_attn", trusted)) and only_flash is None,
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
    installed = {kernel for kernel, distribution in _DISTRIBUTIONS.items() if _is_installed(distribution)}
    return Machine(capability, frozenset(installed), varlen.kernel_parameters())


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
        device=torch.device("cuda", torch.cuda.current_device()),
    )


def choose_attention(
    choice: str, needs: Needs, here: Machine, *, check: Callable[[str, Needs], str | None] | None = None
) -> AttentionChoice:
    """Choose the kernel for `model.attention: choice` and register it with transformers.

    `auto` takes the first of these that supports the model on this machine; all keep packed documents apart:

    1. FlashAttention 3 on Hopper, for which it was written (arXiv:2407.08608);
    2. FlashAttention 4, 3, 2, then torch's own kernels for variable lengths;
    3. PyTorch's scaled-dot-product attention;
    4. for scores that it can't compute (soft-capping, attention sinks) flex_attention, which has to be compiled, or
       eager attention without a CUDA device.

    `check` runs a kernel and returns an error, or None. Without it, and without a CUDA device, no kernel is run.
    Raises UserError for a kernel chosen by name that can't be used, with what to install or to write instead.
    """
    varlen.register()

    def failure_of(kernel: str) -> str | None:
        if check is None or here.capability is None or kernel not in _INSTALL:
            return None
        failure = check(kernel, needs)
        return f"fails here: {failure}" if failure else None

    if choice != "auto":
        if reason := _objection(choice, needs, here) or failure_of(choice):
            is_missing = choice in _INSTALL and _missing(choice, here)
            remedy = f"{_INSTALL[choice]}, or write" if is_missing else "Write"
            raise UserError(f"model.attention: {choice} {reason}. {remedy} `auto`.")
        return AttentionChoice(choice)
    first = ["flash_attention_3"] if here.capability and here.capability[0] == 9 else []
    order, reasons = [*dict.fromkeys([*first, *_INSTALL]), "sdpa", "flex_attention"], []
    if here.capability is None:
        order, reasons = ["sdpa"], ["FlashAttention needs a CUDA device"]
    for kernel in order:
        reason = _objection(kernel, needs, here) or failure_of(kernel)
        if reason is None:
            return AttentionChoice(kernel, tuple(reasons))
        reasons.append(f"{kernel} {reason}")
    return AttentionChoice("eager", tuple(reasons))


def _objection(kernel: str, needs: Needs, here: Machine) -> str | None:
    """Return why `kernel` can't be used, as a continuation of its name; None if it can."""
    if kernel == "eager":
        return None
    if kernel == "sdpa":
        if needs.softcap:
            return "does not support soft-capping of scores, which this model uses"
        return None if needs.sdpa else "is not supported by this model's code"
    if kernel == "flex_attention":
        if not needs.flex:
            return "is not supported by this model's code"
        if needs.dropout:
            return f"does not support dropout, and this model's attention_dropout is {needs.dropout}"
        return None if here.capability else "needs a CUDA device, and there is none"  # no backward on a CPU
    if missing := _missing(kernel, here):
        return missing
    if here.capability is None:
        return "needs a CUDA device, and there is none"
    return _flash_objection(kernel, needs, here.capability, here)


def _missing(kernel: str, here: Machine) -> str | None:
    if kernel == varlen.NAME:
        return None if here.varlen_takes else "needs a newer torch, which is not installed"
    return None if kernel in here.installed else f"needs the package {_DISTRIBUTIONS[kernel]}, which is not installed"


def _flash_objection(kernel: str, needs: Needs, capability: tuple[int, int], here: Machine) -> str | None:
    """Return why this FlashAttention can't be used (sources: transformers' checks, the READMEs of flash-attention)."""
    major = capability[0]
    generation = f"compute capability {capability[0]}.{capability[1]}"
    if not needs.flash or (kernel == varlen.NAME and not needs.registered):
        return "is not supported by this model's code"
    if needs.dtype not in ("bfloat16", "float16"):
        return f"computes in 16 bits, not in {needs.dtype}"
    if needs.head_size > 256:
        return f"supports head sizes up to 256, not {needs.head_size}"
    if major < (9 if kernel == "flash_attention_4" else 8):
        return f"does not run on {generation}"
    if kernel == "flash_attention_3" and major != 9:
        return f"is for Hopper, not for {generation}"
    if needs.dropout and kernel != "flash_attention_2":
        return f"does not support dropout, and this model's attention_dropout is {needs.dropout}"
    if kernel == varlen.NAME:
        return _varlen_objection(needs, capability, here)
    return None


def _varlen_objection(needs: Needs, capability: tuple[int, int], here: Machine) -> str | None:
    if needs.head_size % 8:
        return f"supports head sizes that are multiples of 8, not {needs.head_size}"
    if needs.softcap:
        return "does not support soft-capping of scores, which this model uses"
    if needs.sliding_window and "window_size" not in here.varlen_takes:
        window = f"and this model's is {needs.sliding_window}"
        return f"does not support a sliding window with torch {torch.__version__}, {window}"
    # torch's sdp_utils.cpp: no backward for these sizes where shared memory is small
    if 192 < needs.head_size <= 224 and capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"has no backward for head size {needs.head_size} on compute capability {capability[0]}.{capability[1]}"
    return None
