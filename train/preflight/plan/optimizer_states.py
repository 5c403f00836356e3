"""Bytes of state that each optimizer keeps, read in the sources of torch, transformers and bitsandbytes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_BLOCK = 256
"""bitsandbytes: elements that share one float32 scale (Dettmers et al., arXiv:2110.02861, used 2,048)."""
_LEAST_8BIT = 4_096
"""bitsandbytes' min_8bit_size: tensors with fewer elements keep float32 states."""


class Tensor(NamedTuple):
    """What an optimizer gets as one parameter. `embedding`: the weight of a torch.nn.Embedding, seen as such."""

    shape: tuple[int, ...]
    itemsize: int
    embedding: bool = False

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


_MOMENTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
"""torch's: states are made like the parameter, in its dtype (torch/optim/adamw.py: zeros_like)."""
_BITSANDBYTES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), (2, 8)),
    "paged_adamw_32bit": (2, 32),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, 8)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), (1, 32)),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 32)),
    "rmsprop_bnb_8bit": (1, 8),
}
_STEPPED = ("adamw_torch", "adamw_torch_fused", "rmsprop", "adagrad")
_STEP_BYTES = 4  # a float32 of its own with each tensor
KNOWN = (*_MOMENTS, *_BITSANDBYTES, "adafactor")


def is_paged(optimizer: str) -> bool:
    """Whether its states may leave for host memory when the GPU's runs out (CUDA unified memory)."""
    return optimizer.startswith("paged_")


def runs_on_host(optimizer: str) -> bool:
    """Whether DeepSpeed can run it on the CPU, where it makes a DeepSpeedCPUAdam of it (accelerate does)."""
    return optimizer in ("adamw_torch", "adamw_torch_fused")


def state_bytes(optimizer: str, tensors: Sequence[Tensor]) -> int:
    """Bytes of the states of `training.optim: optimizer` for these tensors; an unknown one counts as float32 AdamW.

    torch: two moments (AdamW) in the DTYPE OF THE PARAMETER, so 4 bytes a parameter in pure bfloat16 and 8 in float32,
    and 4 bytes a tensor for the step. bitsandbytes: float32 whatever the parameter's dtype, or 1 byte and 1/64 of one
    for the scales; transformers has it keep the states of embeddings in 32 bits (Trainer.create_optimizer), which
    DeepSpeed's flat tensors hide from it. Adafactor without momentum (transformers' default), in float32: a row and a
    column for each matrix (Shazeer and Stern, arXiv:1804.04235), as many numbers as parameters for a flat tensor, and
    the tensor's mean square.
    """
    return sum(_of_one(optimizer, one) for one in tensors)


def _of_one(optimizer: str, one: Tensor) -> int:
    if optimizer in _MOMENTS:
        return _MOMENTS[optimizer] * one.elements * one.itemsize + (_STEP_BYTES if optimizer in _STEPPED else 0)
    if optimizer in _BITSANDBYTES:
        moments, bits = _BITSANDBYTES[optimizer]
        if bits == 32 or one.elements < _LEAST_8BIT or one.embedding:
            return moments * one.elements * 4
        return moments * (one.elements + 4 * -(-one.elements // _BLOCK))
    if optimizer == "adafactor":
        factors = math.prod(one.shape[:-1]) + math.prod(one.shape[:-2]) * one.shape[-1]
        return 4 * (one.elements if len(one.shape) < 2 else factors) + _STEP_BYTES
    return 2 * one.elements * 4
