"""Arithmetic and hours of a run, by a convention that is stated."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.model.architecture import Architecture

CONVENTION = (
    "6 FLOPs a token for each non-embedding parameter that is trained, 4 for a frozen one (forward, and backward to "
    "its input), and causal attention inside each document; activations computed again don't count"
)
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A6000": 154.85e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1300e12,
}
"""FLOP/s of dense bfloat16 matrices, from the makers' data sheets (as TRL and torchtitan have them)."""
MEMORY_GIB = {"GB200": 186, "H200": 141, "H100": 80, "H20": 96, "A6000": 48, "A10": 24, "L40S": 48, "L4": 24}
"""Of GPUs that come in one size, from the makers' data sheets."""
DEFAULT_GPU, DEFAULT_MFU = "H100", 0.4
"""llm-foundry's 7B in full on 8 x H100 at 2,048 to 8,192 tokens: 37 to 46 % (its scripts/train/benchmarking)."""


def peak_flops(device: str) -> float | None:
    """FLOP/s of dense bfloat16 of a GPU by the name that its driver gives (`NVIDIA A100-SXM4-80GB`), where known.

    Cards of the same name on a slower board (H100 PCIe: 756 TFLOP/s, H100 NVL: 835) have no known peak here.
    """
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    if words & {"PCIE", "NVL"} and not words & {"A100"}:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


class Flops(NamedTuple):
    """FLOPs of some tokens, forward and backward: of the parameters' matrices, and of attention."""

    parameters: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.parameters + self.attention


def count_training_flops(shape: Architecture, documents: NDArray[np.integer]) -> Flops:
    """FLOPs to train once on documents of these lengths in tokens, by CONVENTION.

    Kaplan et al. (arXiv:2001.08361, section 2.1) and Chowdhery et al. (arXiv:2204.02311, appendix B): 2 forward and 4
    backward for each parameter but the input's embedding table, which is looked up; the output layer counts, tied or
    not. A frozen weight has no gradient of its own: 2 backward. Attention: a query and a key that it sees make
    2 x 2 x query width forward and twice that backward. A document of n tokens has n(n+1)/2 such pairs, fewer under a
    sliding window: packed documents don't see each other, so the sequence's length doesn't matter.
    """
    each = 0
    for one in shape.parameters:
        if one.unused or (one.role == "embedding" and not shape.tied):
            continue
        each += (6 if one.trained else 4) * one.elements
    lengths = documents.astype(np.float64)
    pairs = 0.0
    for window in set(shape.windows):
        seen = np.minimum(lengths, window or np.inf)
        pairs += shape.windows.count(window) * float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())
    return Flops(each * float(lengths.sum()), 12.0 * shape.query_width * pairs)


def estimate_hours(flops: float, gpus: int, peak_flops: float, mfu: float) -> float:
    """Wall-clock hours of `flops` on so many GPUs, each at the share `mfu` of `peak_flops` FLOP/s."""
    return flops / (gpus * peak_flops * mfu) / 3600
