"""Atomic writes: after a full disk or a kill, a result file is complete or as it was before, never cut or empty."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(*paths: Path) -> Iterator[list[Path]]:
    """Yield a temporary file beside each of `paths`, with the same suffix, and move them into place at the end.

    The files are moved one after the other. If the block raises, all of `paths` stay as they were and the temporary
    files are removed. Raises OSError; for a folder among `paths` before anything is written.
    """
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary_files = [path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}") for path in paths]
    try:
        yield temporary_files
        for temporary, path in zip(temporary_files, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporary_files:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write UTF-8 with line ends unchanged; lone surrogates, which UTF-8 lacks, become JSON escapes (\ud800)."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
