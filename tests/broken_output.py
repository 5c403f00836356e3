"""Standard output that can't be written, for commands that are run in this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
everywhere = pytest.mark.parametrize("where", [pytest.param("full", marks=needs_full), "unread"])


def open_output(where: str) -> int:
    """Return a descriptor of a device that is full (`full`), or of a pipe without a reader (`unread`)."""
    if where == "full":
        return os.open("/dev/full", os.O_WRONLY)
    read, output = os.pipe()
    os.close(read)
    return output


@contextmanager
def broken_stdout(where: str) -> Iterator[None]:
    """Replace sys.stdout inside the block by a buffered stream to such a descriptor, as a process is started with."""
    with pytest.MonkeyPatch.context() as patch, open(open_output(where), "w", encoding="utf-8") as stream:
        patch.setattr("sys.stdout", stream)
        yield
