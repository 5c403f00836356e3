"""FLOPs of a training run, by CONVENTION."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.model.architecture import Architecture, Parameter

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
"""FLOP/s of dense bfloat16 matrix products, from the vendors' data sheets (as in TRL and torchtitan)."""
FLOAT32_FLOPS = {  # float32, and TF32 tensor cores without sparsity (training.tf32)
    "GB200": (80e12, 1250e12),
    "B200": (75e12, 1125e12),
    "H200": (67e12, 494.5e12),
    "H100": (67e12, 494.5e12),
    "H20": (44e12, 74e12),
    "A100": (19.5e12, 156e12),
    "A6000": (38.7e12, 77.4e12),
    "A10": (31.2e12, 62.5e12),
    "L40S": (91.6e12, 183e12),
    "L4": (30.3e12, 60e12),
    "MI300X": (163.4e12, 653.7e12),
}
"""FLOP/s of matrix products of float32 numbers, from the vendors' data sheets (half of TF32 with sparsity)."""
MEMORY_MIB = {  # by the GB that a GPU is sold with; the first size of a GPU that is sold in one
    ("GB200", 186): 189_471,
    ("B200", 180): 183_359,
    ("H200", 141): 143_771,
    ("H100", 80): 81_559,
    ("H20", 96): 97_871,
    ("A100", 80): 81_251,  # 81,920 by older drivers
    ("A100", 40): 40_960,
    ("A6000", 48): 49_140,
    ("A10", 24): 23_028,
    ("L40S", 48): 46_068,
    ("L4", 24): 23_034,
}
"""MiB of a GPU as nvidia-smi reports it: A100-40GB, A10, H100, L4 and L40S in modal-labs/modal-client#2797, the others
in outputs that public repositories show. L4, A10 and L40S give a sixteenth of theirs to ECC."""
DEFAULT_GPU, DEFAULT_MFU = "H100", 0.4
"""llm-foundry reaches 37 to 46 % with a 7B in full on 8 x H100 at 2,048 to 8,192 tokens (its benchmarking scripts)."""


def peak_flops(device: str) -> float | None:
    """Return the FLOP/s of dense bfloat16 of a GPU by its driver's name (`NVIDIA A100-SXM4-80GB`); None if unknown.

    Slower boards of the same name (H100 PCIe: 756 TFLOP/s, H100 NVL: 835) count as unknown.
    """
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    if words & {"PCIE", "NVL"} and not words & {"A100"}:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


class Flops(NamedTuple):
    """FLOPs of a forward and backward pass: of the products with parameters, and of attention."""

    parameters: float
    attention: float

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.parameters + self.attention


def count_training_flops(shape: Architecture, documents: NDArray[np.integer]) -> Flops:
    """Return the FLOPs to train once on documents of these lengths in tokens, by CONVENTION.

    - Parameters (Kaplan et al., arXiv:2001.08361, section 2.1; Chowdhery et al., arXiv:2204.02311, appendix B): 2 FLOPs
      forward and 4 backward per token, except for the input embedding, which is a lookup. The output layer counts, tied
      or not. A frozen weight has no gradient of its own: 2 backward.
    - Attention: each pair of a query and a key that it attends to takes 2 x 2 x query width forward and twice that
      backward. A document of n tokens has n(n+1)/2 pairs, fewer under a sliding window. Packed documents don't attend
      to each other, so the length of the sequence doesn't matter.
    """
    per_token = sum((6 if parameter.trained else 4) * parameter.elements for parameter in multiplied(shape))
    return Flops(per_token * float(documents.sum()), 3 * _count_attention(shape, documents))


def count_forward_flops(shape: Architecture, documents: NDArray[np.integer]) -> float:
    """Return the FLOPs of a forward pass alone: those of `count_training_flops` without the backward pass."""
    per_token = 2 * sum(parameter.elements for parameter in multiplied(shape))
    return per_token * float(documents.sum()) + _count_attention(shape, documents)


def multiplied(shape: Architecture) -> list[Parameter]:
    """Return the parameters that CONVENTION counts: all but an input embedding and those that no token uses."""
    return [
        parameter
        for parameter in shape.parameters
        if not parameter.unused and (parameter.role != "embedding" or shape.tied)
    ]


def _count_attention(shape: Architecture, documents: NDArray[np.integer]) -> float:
    """Return the FLOPs of attention in a forward pass."""
    lengths = documents.astype(np.float64)
    pairs = 0.0
    for window in set(shape.windows):
        seen = np.minimum(lengths, window or np.inf)
        pairs += shape.windows.count(window) * float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())
    return 4.0 * shape.query_width * pairs
