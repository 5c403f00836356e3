"""One run of a command at a time in a folder of results: two would write over each other's files."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Keep a second run of `command` out of `folder`, which is there, while what runs inside writes to it.

    Another command writes to other files and is not kept out: a model may be measured in several ways at once. Raises
    UserError where another run is in it, or where it can't be written. The lock is train/loop/saving.py's: it goes with
    the process, however that ends, and its children don't have it; where the file system has none, nobody is kept out.
    """
    try:
        lock = (folder / f".{command}.lock").open("a+", encoding="utf-8")
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        except OSError as fault:
            if fault.errno in (errno.EACCES, errno.EAGAIN):
                lock.seek(0)
                raise UserError(
                    f"{folder}: another run of `{command}` is writing there ({lock.read() or 'unknown'}). Wait for its "
                    "end, stop it, or have the results of this one in another folder."
                ) from fault
        yield
