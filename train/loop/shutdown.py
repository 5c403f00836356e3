"""Shut down all ranks together after a user error."""

import time
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

_POLL_SECONDS = 0.05


def shutdown_process_group(seconds: float = 30.0) -> None:
    """Wait until all processes of the group have called this, at most `seconds`. Does nothing without a group.

    A process that exits while another is still joining the group (the start of a group waits for nobody) would end
    that one with a network error and a traceback, below the `error:` that the user should read. This uses the group's
    store: a collective would need the others to be at the same point.
    """
    if not distributed.is_initialized():
        return
    store, processes = _get_default_store(), distributed.get_world_size()
    store.set_timeout(timedelta(seconds=seconds))
    deadline = time.monotonic() + seconds

    def wait_for(name: str, count: int) -> None:
        while store.add(name, 0) < count and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    try:
        store.add("leaving", 1)
        wait_for("leaving", processes)
        # the first process may host the store, which the others still read
        if distributed.get_rank() > 0:
            store.add("left", 1)
        else:
            wait_for("left", processes - 1)
    except RuntimeError:
        return  # the host has exited: there is nothing to wait for
