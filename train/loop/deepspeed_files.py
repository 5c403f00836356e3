"""DeepSpeed's part of a checkpoint, written where no process waits for another.

`engine.save_checkpoint` writes between its collectives: a process whose disk is full leaves it by an exception, and the
others wait in a barrier that it never comes to. Here they all come through first, and each then writes its own files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _Kept:
    """In the place of an engine's writer: what it is to write is kept, by reference and not as a copy."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.files: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.files.append((state_dict, path))


@contextmanager
def written_last(engine: Any) -> Iterator[None]:
    """Have the files that a DeepSpeed engine saves inside the block written at its end."""
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = kept = _Kept(writer)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
    while kept.files:
        state, path = kept.files.pop(0)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        writer.save(state, path)
        del state
