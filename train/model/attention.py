"""Which attention kernel a run uses, and why not another."""

import importlib.util

import torch

from train.errors import UserError

PACKAGES = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}


def choose_attention(wanted: str, dtype: str) -> str:
    """Name under which transformers knows the kernel for `model.attention: wanted`.

    `auto` takes FlashAttention 2 where it is installed, there is a CUDA device and the weights are in 16 bits, and
    PyTorch's own scaled-dot-product attention otherwise: both keep packed documents apart.
    Raises UserError for a kernel that this machine lacks.
    """
    if wanted == "auto":
        half = dtype in ("bfloat16", "float16")
        usable = half and torch.cuda.is_available() and _installed("flash_attention_2")
        return "flash_attention_2" if usable else "sdpa"
    if wanted in PACKAGES and not _installed(wanted):
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}[wanted]
        raise UserError(
            f"model.attention: {wanted} needs the package {package}, which is not installed here. Install it with "
            f"`pip install {package} --no-build-isolation`, or write `auto`."
        )
    if wanted in (*PACKAGES, "flex_attention") and not torch.cuda.is_available():  # flex has no backward on a CPU
        raise UserError(f"model.attention: {wanted} needs a CUDA device, and there is none. Write `auto` or `sdpa`.")
    return wanted


def _installed(kernel: str) -> bool:
    return importlib.util.find_spec(PACKAGES[kernel]) is not None
