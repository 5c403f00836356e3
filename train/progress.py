"""How far a long job is: a bar in a terminal, a line now and then in a log file; the first rank alone speaks."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.formatting import duration
from train.ranks import is_first_rank

SECONDS_BETWEEN_LINES = 15.0
"""How often a job writes a line where the output is not a terminal."""


class ProgressBar:
    """One long job. `advance` and `show` may be called as often as one likes."""

    def __init__(self, description: str, total: int | None, unit: str, bar: Progress | None, *, done: int = 0) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._bar, self._done_before = bar, done
        self._task = bar.add_task(description, total=total, completed=done, unit=unit) if bar else None
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """`amount` more of `unit` are done."""
        self.done += amount
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif is_first_rank() and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self.description}: {self._how_far()}", flush=True)

    def show(self, line: str) -> None:
        """Print a line, above the bar if there is one. In a log file it stands for the one that would be due."""
        self._last_line = time.monotonic()
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif is_first_rank():
            print(line, flush=True)

    def part(self, description: str, total: int | None, unit: str) -> "ProgressBar":
        """A job within this one, with a bar of its own below this one's until it is finished."""
        return ProgressBar(description, total, unit, self._bar)

    def finish(self) -> None:
        """Take this job's bar away."""
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)

    def _how_far(self) -> str:
        if not self.total:
            return f"{self.done:,} {self.unit}"
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self.done - self._done_before, 1) * (self.total - self.done)
        share = self.done / self.total
        return f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%}), {duration(left)} left"


@contextmanager
def progress_bar(description: str, *, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[ProgressBar]:
    """Show the progress of what runs inside. `total` in `unit`s, None where it isn't known; `done` before it began."""
    console = Console(file=sys.stdout)
    if not (console.is_terminal and is_first_rank()):
        yield ProgressBar(description, total, unit, None, done=done)
        return
    counted = MofNCompleteColumn() if total else TimeElapsedColumn()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        counted,
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield ProgressBar(description, total, unit, bar, done=done)
