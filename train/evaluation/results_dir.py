"""One run of a command at a time in a folder of results: two would write over each other's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.errors import UserError
from train.storage.file_lock import LockHeldError, acquire_lock


@contextmanager
def exclusive(folder: Path, command: str) -> Iterator[None]:
    """Keep a second run of `command` out of `folder`, which is there, while what runs inside writes to it.

    Another command writes to other files and is not kept out: a model may be measured in several ways at once. Raises
    UserError where another run is in it, or where it can't be written.
    """
    try:
        lock = acquire_lock(folder / f".{command}.lock")
    except LockHeldError as holder:
        raise UserError(
            f"{folder}: another run of `{command}` is writing there ({holder}). Wait for its end, stop it, or have the "
            "results of this one in another folder."
        ) from holder
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    with lock:
        yield
