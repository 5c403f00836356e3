"""Leaving a process group as one, where all of its processes end with a fault of the user's."""

import time
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

_SECONDS_BETWEEN_LOOKS = 0.05


def shutdown_process_group(seconds: float = 30.0) -> None:
    """Wait until all processes of the group have come here, at most `seconds` for those that don't.

    A process that leaves while another is still joining the group (the group's own start waits for nobody) ends that
    one with a network error and its stack, below the one `error:` that the user should read. Goes through the group's
    store, as a collective would need the others where this process is. Does nothing where there is no group.
    """
    if not distributed.is_initialized():
        return
    store, processes = _get_default_store(), distributed.get_world_size()
    store.set_timeout(timedelta(seconds=seconds))
    until = time.monotonic() + seconds

    def wait_for(name: str, count: int) -> None:
        while store.add(name, 0) < count and time.monotonic() < until:
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    try:
        store.add("leaving", 1)
        wait_for("leaving", processes)
        # the first process may be the store's host, and the others still look at it
        if distributed.get_rank() > 0:
            store.add("left", 1)
        else:
            wait_for("left", processes - 1)
    except RuntimeError:
        return  # the host is gone, and with it what there was to wait for
