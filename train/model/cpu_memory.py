"""Memory of models on CPUs, kept by the C library for the next tensors."""

import ctypes
import sys

# options of mallopt(3), malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROWTH = 256 * 1024**2


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations; on other systems nothing changes.

    By default glibc returns tensors of more than 32 MB to the system as soon as they are freed, and the system clears
    each page of the next one. With SmolLM2-135M in steps of 512 tokens, 168 tokens/s become 250 on 2 cores. The process
    keeps its peak memory.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # all from the heap ...
        mallopt(_TRIM_THRESHOLD, -1)  # ... which never shrinks ...
        mallopt(_TOP_PAD, _GROWTH)  # ... and grows in large pieces
