"""Bytes of tensors, counted on their storages and not computed from a formula."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of the storages behind the tensors, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Context that measures `peak`: the most bytes allocated beyond those at its beginning.

    Counts every storage that an operation allocates until it is freed, and subtracts storages of `held` that are freed.
    """

    def __init__(self, held: Iterable[torch.Tensor | None] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            if tensor is not None:
                self._watch(tensor, new=False)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        outputs = operation(*arguments, **(keywords or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((arguments, keywords)) if torch.is_tensor(tensor)
        }
        for tensor in tree_leaves(outputs):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                self._watch(tensor, new=True)
        return outputs

    def _watch(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        if new:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
