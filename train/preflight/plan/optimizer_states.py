"""Bytes of state of each optimizer, from the sources of torch, transformers and bitsandbytes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_BLOCK = 256
"""Elements that share a float32 scale in bitsandbytes (Dettmers et al., arXiv:2110.02861, used 2,048)."""
_MIN_8BIT_SIZE = 4_096
"""min_8bit_size of bitsandbytes: tensors with fewer elements keep float32 states."""


class Tensor(NamedTuple):
    """A parameter as an optimizer sees it. `embedding`: it is recognized as the weight of a torch.nn.Embedding."""

    shape: tuple[int, ...]
    itemsize: int
    embedding: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


_MOMENTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
"""Moments of torch's optimizers, in the parameter's dtype (torch/optim/adamw.py: zeros_like)."""
_BITSANDBYTES = {  # moments, bits of each
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
    """Return whether its states may be moved to host memory when the GPU's is full (CUDA unified memory)."""
    return optimizer.startswith("paged_")


def runs_on_host(optimizer: str) -> bool:
    """Return whether it can run on the CPU: accelerate replaces it by DeepSpeedCPUAdam."""
    return optimizer in ("adamw_torch", "adamw_torch_fused")


def state_bytes(optimizer: str, tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the states of `training.optim: optimizer`; an unknown one counts as float32 AdamW.

    - torch: two moments (AdamW) in the dtype of the parameter, so 4 bytes per parameter in pure bfloat16 and 8 in
      float32, and 4 bytes per tensor for the step.
    - bitsandbytes: float32 for any dtype of the parameter, or 1 byte and 1/64 byte for the scales. transformers has it
      keep the states of embeddings in 32 bits (Trainer.create_optimizer), which DeepSpeed's flat tensors prevent.
    - Adafactor without momentum (transformers' default), in float32: a row and a column per matrix (Shazeer and Stern,
      arXiv:1804.04235), as many numbers as parameters for a flat tensor, and the tensor's mean square.
    """
    return sum(_tensor_bytes(optimizer, tensor) for tensor in tensors)


def _tensor_bytes(optimizer: str, tensor: Tensor) -> int:
    if optimizer in _MOMENTS:
        return _MOMENTS[optimizer] * tensor.elements * tensor.itemsize + (_STEP_BYTES if optimizer in _STEPPED else 0)
    if optimizer in _BITSANDBYTES:
        moments, bits = _BITSANDBYTES[optimizer]
        if bits == 32 or tensor.elements < _MIN_8BIT_SIZE or tensor.embedding:
            return moments * tensor.elements * 4
        return moments * (tensor.elements + 4 * -(-tensor.elements // _BLOCK))
    if optimizer == "adafactor":
        factors = math.prod(tensor.shape[:-1]) + math.prod(tensor.shape[:-2]) * tensor.shape[-1]
        return 4 * (tensor.elements if len(tensor.shape) < 2 else factors) + _STEP_BYTES
    return 2 * tensor.elements * 4
