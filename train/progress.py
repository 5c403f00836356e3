"""Progress of long operations: a bar in a terminal, a line now and then in a log file, from the first rank only."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.formatting import duration
from train.ranks import is_first_rank

SECONDS_BETWEEN_LINES = 15.0
"""Interval of progress lines where the output is not a terminal."""


class ProgressBar:
    """Progress of one operation. `advance` and `show` are cheap and may be called often."""

    def __init__(self, description: str, total: int | None, unit: str, bar: Progress | None, *, done: int = 0) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._bar, self._done_before = bar, done
        self._task = bar.add_task(description, total=total, completed=done, unit=unit) if bar else None
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif is_first_rank() and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self.description}: {self._status()}", flush=True)

    def show(self, line: str) -> None:
        """Print a line, above the bar if there is one. In a log file it replaces the next progress line."""
        self._last_line = time.monotonic()
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif is_first_rank():
            print(line, flush=True)

    def part(self, description: str, total: int | None, unit: str) -> "ProgressBar":
        """Return the progress of a nested operation, with its own bar below this one until it is finished."""
        return ProgressBar(description, total, unit, self._bar)

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)

    def _status(self) -> str:
        if not self.total:
            return f"{self.done:,} {self.unit}"
        elapsed = time.monotonic() - self._started
        remaining = elapsed / max(self.done - self._done_before, 1) * (self.total - self.done)
        share = self.done / self.total
        return f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%}), {duration(remaining)} left"


@contextmanager
def progress_bar(description: str, *, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of the block.

    Args:
        description: name of the operation.
        total: number of units; None if unknown.
        unit: plural noun, such as `rows`.
        done: units done before, by an interrupted run.
    """
    console = Console(file=sys.stdout)
    if not (console.is_terminal and is_first_rank()):
        yield ProgressBar(description, total, unit, None, done=done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total else TimeElapsedColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield ProgressBar(description, total, unit, bar, done=done)
