"""Exchange of values between the ranks of a launch through its key-value store, the one that process groups start from.

It needs no process group, so ranks can use it before there is one, and in a background thread while training uses the
groups: collectives of two threads would mix. The connection to the store is its own, and no call blocks another.
"""

import errno
import json
import os
import time
from functools import cache
from threading import Event
from typing import Any

from train.ranks import world_size
from train.storage.transfer_time import longest_transfer

_POLL_SECONDS = 0.05


def has_peers() -> bool:
    """Return whether this process is one of several ranks that can reach each other's store."""
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    return world_size() > 1 and all(os.environ.get(name) for name in needed)


def exchange(value: Any, seconds: int = longest_transfer(0)) -> list[Any]:
    """Return the values that all ranks pass to this call, in the order of ranks. Waits at most `seconds` for them."""
    from torch.distributed.elastic.utils.store import synchronize

    store, rank = _store(), int(os.environ["RANK"])
    texts = synchronize(store, json.dumps(value).encode(), rank, world_size(), f"{_next_call()}/", seconds)
    return [json.loads(text) for text in texts]


def collect(value: Any, seconds: int, abandoned: Event) -> list[Any] | None:
    """Return on the first rank the values that all ranks pass to this call, in the order of ranks; None on others.

    Only the first rank waits. Raises TimeoutError there after `seconds`, or soon after `abandoned` is set.
    """
    store, rank, call = _store(), int(os.environ["RANK"]), _next_call()
    keys = [f"{call}/{peer}" for peer in range(world_size())]
    store.set(keys[rank], json.dumps(value))
    if rank > 0:
        return None
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if abandoned.wait(_POLL_SECONDS) or time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "not all processes have written their part")
    texts = store.multi_get(keys)
    for key in keys:
        store.delete_key(key)
    return [json.loads(text) for text in texts]


def _next_call() -> str:
    """Return a key that all ranks give to the same call, as they make the same calls in the same order."""
    rank = os.environ["RANK"]
    return f"call {_store().add(f'calls of rank {rank}', 1)}"


@cache
def _store() -> Any:
    """Connect to the launch's store. It stays open: without torchrun rank 0 hosts it, for the process group too."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return PrefixStore("checkpoint files", store)
