"""File locks between processes, which keep two runs from writing to one folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO


class LockHeldError(Exception):
    """Another process holds the lock; the message names it."""


def acquire_lock(path: Path) -> TextIO:
    """Lock a file, created if necessary, until the returned stream is closed or the process ends.

    A POSIX lock: children don't inherit it, and file systems without locks keep nobody out. Raises LockHeldError, and
    OSError where the file can't be written.
    """
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.seek(0)
            raise LockHeldError(lock.read() or "unknown") from error
    return lock
