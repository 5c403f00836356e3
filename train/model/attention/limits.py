"""Limits of attention kernels: models and devices on which a kernel has no forward or no backward pass.

They are read in the kernels' sources, so that a kernel that can't work is not tried, and the start screen says why:

- flash-attention's README and issue 579: FlashAttention 2 on compute capability 8.0 and later, head sizes up to 256,
  above 192 without dropout where shared memory is small; 3 on Hopper only;
- flash_attn/cute/interface.py of flash-attn-4 4.0.0b36: backward on 9.x to 12.x; on 10.x and 11.x head sizes up to 128,
  and 256 without soft-capping and sinks; on 12.x neither of the two;
- csrc/flash_attn_ck/mha_varlen_fwd.cpp of flash-attention: ROCm's kernels take a softcap and ignore it; mha.py of
  kernels-community/aiter-flash-attn: windows and sinks with a backward, no soft-capping;
- aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch, for torch_varlen; on AMD's GPUs torch calls AOTriton,
  with the tests of variable lengths and windows passing since torch 2.11 (pytorch#174105);
- FLASH_ATTN_KERNEL_DEVICES in transformers/modeling_flash_attention_utils.py: vendors of the hub's kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_DEVICES

from train.model.attention import torch_varlen as varlen
from train.model.hub_kernels import is_trusted, parse_hub_kernel, unavailable_reason

DISTRIBUTIONS = {  # keys: transformers' names
    "flash_attention_4": "flash-attn-4",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_2": "flash-attn",
}
HUB_KERNELS = {
    "flash_attention_4": "kernels-community/flash-attn4",
    "flash_attention_3": "kernels-community/flash-attn3",
    "flash_attention_2": "kernels-community/flash-attn2",
}
"""The same code, compiled: repositories of the hub that `auto` uses where they are in the cache. Not
vllm-flash-attn3, in which transformers sees version 3: it has no backward with sinks (cosmos-rl#219)."""
ROCM_HUB_KERNELS = {"flash_attention_2": "kernels-community/aiter-flash-attn"}
_SAME_CODE = {
    **{name: generation for kernels in (HUB_KERNELS, ROCM_HUB_KERNELS) for generation, name in kernels.items()},
    "kernels-community/vllm-flash-attn3": "flash_attention_3",
}
_SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""About 100 KB for a block of threads, which the backward pass of large heads exceeds."""


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
    sinks: bool = False
    """Learnable logits of each head that take part in its softmax (gpt-oss)."""
    dropout: float = 0.0
    only: tuple[str, ...] | None = None
    """The FlashAttention kernels that the model's code allows; transformers replaces others. None = any."""
    trust_remote_code: bool = False
    flash: bool = True
    """Support of FlashAttention by the architecture's code in transformers; so for the three below."""
    registered: bool = True
    """Use of transformers' AttentionInterface, where torch_varlen is registered; other code ignores it."""
    flex: bool = True
    sdpa: bool = True
    pairs: bool = False
    """The rows of a sequence are pairs, in preference training (of `select_attention` only)."""


@dataclass(frozen=True)
class Machine:
    """Capabilities of this process."""

    capability: tuple[int, int] | None
    """CUDA's compute capability, (9, 0) for an H100; on AMD's GPUs the version of the architecture, (9, 4) for an
    MI300; None without a GPU."""
    installed: frozenset[str]
    """Kernels whose package is installed, and kernels of the hub that are in its cache."""
    varlen_takes: frozenset[str] = frozenset({"scale", "window_size"})
    """Parameters of torch's own kernel for variable lengths; empty = this torch has no such kernel."""
    blocked: Mapping[str, str] = field(default_factory=dict)
    """Kernels of the hub that are in its cache and can't be loaded from there, with the reason."""
    rocm: bool = False
    """An AMD GPU: torch is built for ROCm, and calls its device `cuda` too."""


def objection(kernel: str, needs: Needs, here: Machine) -> str | None:
    """Return why `kernel` can't be used, as a continuation of its name; None if it can."""
    return model_objection(kernel, needs) or machine_objection(kernel, needs, here)


def model_objection(kernel: str, needs: Needs) -> str | None:
    """Return why `kernel` is not for this model and recipe on any machine, as `objection`."""
    if kernel == "eager":
        return None
    if kernel == varlen.BY_DOCUMENT:
        extras = {"attention sinks": needs.sinks, "dropout": needs.dropout}
        if unsupported := [name for name, used in extras.items() if used]:
            return f"does not support {unsupported[0]}, which this model uses"
        if not needs.registered:
            return "is not supported by this model's code"
    if kernel in ("sdpa", varlen.BY_DOCUMENT):
        if needs.softcap:
            return "does not support soft-capping of scores, which this model uses"
        return None if needs.sdpa else "is not supported by this model's code"
    if kernel == "flex_attention":
        if not needs.flex:
            return "is not supported by this model's code"
        if needs.dropout:
            return f"does not support dropout, and this model's attention_dropout is {needs.dropout}"
        return None
    if is_kernel(kernel) and (reason := _name_objection(kernel, needs)):
        return reason
    return _flash_objection(kernel, needs)


def machine_objection(kernel: str, needs: Needs, here: Machine) -> str | None:
    """Return why `kernel` can't run this model on this machine, as `objection`."""
    if kernel in ("eager", "sdpa", varlen.BY_DOCUMENT):
        return None
    if kernel != "flex_attention" and (reason := missing(kernel, here)):
        return reason
    if here.capability is None:
        return "needs a CUDA device, and there is none"  # flex_attention has no backward on a CPU
    return None if kernel == "flex_attention" else _device_objection(kernel, needs, here.capability, here)


def missing(kernel: str, here: Machine) -> str | None:
    """Return what `kernel` needs that is not installed or can't be downloaded."""
    if kernel == varlen.NAME:
        return None if here.varlen_takes else "needs a newer torch, which is not installed"
    if kernel in here.installed or kernel in here.blocked:
        return here.blocked.get(kernel)
    if is_kernel(kernel):
        return unavailable_reason(parse_hub_kernel(kernel))
    return f"needs the package {DISTRIBUTIONS[kernel]}, which is not installed"


def _name_objection(kernel: str, needs: Needs) -> str | None:
    """Return why a kernel of the hub is not loaded, by its name."""
    if not is_trusted(kernel) and not needs.trust_remote_code:
        return "is code of a publisher other than kernels-community, which runs on this machine"
    by_itself, function = parse_hub_kernel(kernel).repo_id in FLASH_ATTN_KERNEL_DEVICES, kernel.partition(":")[2]
    if by_itself and function:
        return f"names the function {function}, and transformers selects the functions of this kernel itself"
    if not by_itself and is_trusted(kernel) and not function:
        others = ", ".join(name.partition("/")[2] for name in FLASH_ATTN_KERNEL_DEVICES)
        return f"is not an attention kernel that transformers knows ({others}), and it names no function of another"
    return None


def _flash_objection(kernel: str, needs: Needs) -> str | None:
    """Return why a FlashAttention kernel is not for this model on any device."""
    if not needs.flash or (kernel == varlen.NAME and not needs.registered):
        return "is not supported by this model's code"
    if needs.only is not None and kernel not in needs.only and kernel != varlen.NAME:
        return f"is not among the kernels that this model's code allows: {', '.join(needs.only)}"
    if needs.dtype not in ("bfloat16", "float16"):
        return f"computes in 16 bits, not in {needs.dtype}"
    if needs.head_size > 256:
        return f"supports head sizes up to 256, not {needs.head_size}"
    if needs.dropout and _code(kernel) != "flash_attention_2":
        return f"does not support dropout, and this model's attention_dropout is {needs.dropout}"
    return None


def _code(kernel: str) -> str | None:
    """Return the name of FlashAttention's package with the same code; None for unknown kernels of the hub."""
    return _SAME_CODE.get(parse_hub_kernel(kernel).repo_id) if is_kernel(kernel) else kernel


def _device_objection(kernel: str, needs: Needs, capability: tuple[int, int], here: Machine) -> str | None:
    """Return why a kernel is not for this device, or not for this model on it."""
    major, code = capability[0], _code(kernel)
    vendors = FLASH_ATTN_KERNEL_DEVICES.get(parse_hub_kernel(kernel).repo_id) if is_kernel(kernel) else None
    vendor, its_name = ("rocm", "an AMD") if here.rocm else ("cuda", "an NVIDIA")
    if vendors and vendor not in vendors:
        return f"has no build for {its_name} GPU"
    if here.rocm and code in ("flash_attention_3", "flash_attention_4"):
        return "is for NVIDIA's GPUs, and this is an AMD GPU"
    if here.rocm and code == "flash_attention_2" and needs.softcap:
        return "does not support soft-capping of scores on AMD's GPUs, and this model uses it"
    generation = f"compute capability {capability[0]}.{capability[1]}"
    if not here.rocm and code is not None:
        if major < (9 if code == "flash_attention_4" else 8):
            return f"does not run on {generation}"
        if code == "flash_attention_3" and major != 9:
            return f"is for Hopper, not for {generation}"
    if code == "flash_attention_4":
        return _flash_4_objection(needs, major, generation)
    if code == varlen.NAME:
        return _varlen_objection(needs, capability, here)
    if needs.dropout and needs.head_size > 192 and not here.rocm and capability in _SMALL_SHARED_MEMORY:
        return f"has no backward with dropout for head size {needs.head_size} on {generation}"
    return None


def _flash_4_objection(needs: Needs, major: int, generation: str) -> str | None:
    size = needs.head_size
    if size % 8 or (major in (10, 11) and 128 < size < 256):
        return f"has no kernel for head size {size} on {generation}"
    extras = {"soft-capping of scores": needs.softcap, "attention sinks": needs.sinks}
    if major == 12 or (major in (10, 11) and size == 256):
        for name, used in extras.items():
            if used:
                return f"has no backward with {name} for head size {size} on {generation}"
    return None


def _varlen_objection(needs: Needs, capability: tuple[int, int], here: Machine) -> str | None:
    if needs.head_size % 8:
        return f"supports head sizes that are multiples of 8, not {needs.head_size}"
    if needs.softcap:
        return "does not support soft-capping of scores, which this model uses"
    if needs.sinks:
        return "does not support attention sinks, which this model uses"
    if needs.sliding_window and "window_size" not in here.varlen_takes:
        window = f"and this model's is {needs.sliding_window}"
        return f"does not support a sliding window with torch {torch.__version__}, {window}"
    if 192 < needs.head_size <= 224 and not here.rocm and capability in _SMALL_SHARED_MEMORY:
        return f"has no backward for head size {needs.head_size} on compute capability {capability[0]}.{capability[1]}"
    return None
