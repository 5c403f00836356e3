"""Files of results are there whole or as they were before: a full disk or a kill leaves none of them cut or empty."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(*paths: Path) -> Iterator[list[Path]]:
    """For each path another one beside it, with the same ending, to be written in its place.

    As the block ends they take the places of `paths`, one after the other. Where it raises, all of `paths` stay as they
    were and what was written is gone. Raises OSError, for a folder among `paths` before anything is written.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    asides = [path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}") for path in paths]
    try:
        yield asides
        for aside, path in zip(asides, paths, strict=True):
            aside.replace(path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, line ends as they are; half of a surrogate pair, which is no text, as JSON's own escape for it."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
