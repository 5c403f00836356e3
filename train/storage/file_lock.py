"""A file that one process at a time holds: what keeps two runs from writing to one folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO


class LockHeldError(Exception):
    """Another process holds the file; the text says which."""


def acquire_lock(path: Path) -> TextIO:
    """Lock a file, made if need be, for as long as what this returns stays open.

    The lock goes with the process, however that ends, and its children don't have it (POSIX's do both); where the file
    system has none, nobody is kept out. Raises HeldError, and OSError where the file can't be written.
    """
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except OSError as fault:
        if fault.errno in (errno.EACCES, errno.EAGAIN):
            lock.seek(0)
            raise LockHeldError(lock.read() or "unknown") from fault
    return lock
