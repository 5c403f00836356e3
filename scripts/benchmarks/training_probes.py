"""Probes of `benchmark.py train`: the device, its matmul and memory ceilings, and the speed of attention kernels."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from train.errors import UserError
from train.model.attention.selection import select_attention
from train.model.flops import peak_flops
from train.recipe import Recipe

_PROBE_SECONDS = 1.0 if torch.cuda.is_available() else 0.1  # of the dry run
_MATMUL = 8_192
"""Rows and columns of the matrices: 2 x 8,192^3 FLOPs fill every GPU."""
_COPIED = 2**30
DOCUMENTS = 8
"""Documents in the sequence of the attention probe."""


def device() -> torch.device:
    """Return the device that is measured."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait until the device has done all of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_device() -> dict[str, Any]:
    """Return name, memory, peak FLOP/s and driver of the device.

    Raises UserError for accelerators other than CUDA and ROCm GPUs.
    """
    facts: dict[str, Any] = {
        "device": "cpu",
        "memory_bytes": None,
        "peak_flops": None,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {
            "device": gpu.name,
            "memory_bytes": gpu.total_memory,
            "peak_flops": peak_flops(gpu.name),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _driver(),
            "allocator": {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")},
        }
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        raise UserError(f"this benchmark measures on CUDA and ROCm GPUs, or on the CPU; this machine has {accelerator}")
    return facts


def _driver() -> str | None:
    """Return driver version, power limit and clock as nvidia-smi has them; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.strip() or None


def seconds_per_call(call: Callable[[], object]) -> float:
    """Return the mean seconds of a call over _PROBE_SECONDS, on the device, after two calls to warm up."""
    call()
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    calls = max(1, min(1_000, round(_PROBE_SECONDS / (time.perf_counter() - began))))
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - began) / calls


def measure_matmul() -> dict[str, Any]:
    """Return the FLOP/s of a large bfloat16 matrix product: the ceiling of any MFU on this device."""
    size = _MATMUL if torch.cuda.is_available() else 256
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return {"flops_per_second": 2 * size**3 / seconds_per_call(lambda: left @ right)}


def measure_bandwidth() -> dict[str, Any]:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    size = _COPIED if torch.cuda.is_available() else 2**22
    source = torch.empty(size, device=device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    return {"bytes_per_second": 2 * size / seconds_per_call(lambda: target.copy_(source))}


def measure_attention(kernel: str, recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    """Test a kernel's isolation, then time a layer's attention forward and backward over a sequence of documents.

    `config`: of a model with one layer. Raises UserError if the kernel can't be used here or fails the test.
    """
    chosen = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": kernel})})
    select_attention(chosen, config)
    config.update({"vocab_size": 64, "pad_token_id": None})
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kernel)
    layer = next(module for module in model.modules() if hasattr(module, "num_key_value_groups"))
    length = recipe.data.max_length // DOCUMENTS
    tokens, size = length * DOCUMENTS, layer.head_dim
    heads = config.num_attention_heads
    query, key, value = (
        torch.randn(1, count, tokens, size, device=device(), dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    borders = torch.arange(0, tokens + 1, length, device=device(), dtype=torch.int32)
    positions = torch.arange(length, device=device()).repeat(DOCUMENTS)[None]
    mask = create_causal_mask(model.config, query[0, :1].detach(), None, None, positions)
    gradient = torch.randn(1, tokens, heads, size, device=device(), dtype=torch.bfloat16)
    attend = AttentionInterface()[kernel]

    def step() -> None:
        output, _ = attend(
            layer, query, key, value, mask, scaling=size**-0.5, sliding_window=None, position_ids=positions,
            cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=length, max_length_k=length,
        )  # fmt: skip
        torch.autograd.grad(output, (query, key, value), gradient.view_as(output))

    seconds = seconds_per_call(step)
    pairs = DOCUMENTS * length * (length + 1) / 2  # 2 x 2 x width FLOPs a pair forward, twice that backward
    return {"seconds": seconds, "flops_per_second": 12.0 * heads * size * pairs / seconds, "tokens": tokens}
