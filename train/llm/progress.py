"""Progress of rows whose requests run: a bar in a terminal, a line now and then in a log file."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from train.formatting import duration
from train.llm.client import Client
from train.progress import SECONDS_BETWEEN_LINES

WINDOW_SECONDS = 60.0
"""Window over which tokens/s and the remaining time are measured, so that a journal read at the start doesn't count."""


class RequestProgress:
    """Number of finished rows, and the speed of rows and tokens."""

    def __init__(self, description: str, total: int | None, client: Client) -> None:
        self.description, self.total, self.client = description, total, client
        self.done = 0
        self._samples: deque[tuple[float, int, int]] = deque()
        self.sample()

    def advance(self, rows: int = 1) -> None:
        """Count finished rows."""
        self.done += rows

    def sample(self) -> None:
        """Note time, rows and tokens; speeds are measured over the samples of the last minute."""
        now = time.monotonic()
        self._samples.append((now, self.done, self.client.counts.completion_tokens))
        while self._samples[0][0] < now - WINDOW_SECONDS:
            self._samples.popleft()

    def line(self) -> str:
        """Return rows, tokens/s, failures, requests in flight, remaining time, and messages about servers."""
        counts = self.client.counts
        (then, rows_then, tokens_then), (now, rows, tokens) = self._samples[0], self._samples[-1]
        seconds = now - then
        of = f" of {self.total:,} rows ({rows / self.total:.0%})" if self.total else " rows"
        parts = [f"{rows:,}{of}", f"{(tokens - tokens_then) / seconds if seconds else 0:,.0f} tokens/s"]
        parts.append(f"{counts.failed:,} failed, {counts.retries:,} retries")
        parts.append(f"{self.client.in_flight:,} in flight")
        if self.total and rows > rows_then:
            parts.append(f"{duration(seconds / (rows - rows_then) * (self.total - rows))} left")
        return "; ".join([", ".join(parts), *self.client.server_messages()])


@asynccontextmanager
async def progress(description: str, total: int | None, client: Client) -> AsyncIterator[RequestProgress]:
    """Show the progress of a block. A server that begins to hold up the run is logged at once."""
    state = RequestProgress(description, total, client)
    console = Console(file=sys.stdout)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(20),
        # Wraps over several lines, since messages about servers come last.
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(overflow="fold")),
        console=console, transient=True, auto_refresh=False,
    ) if console.is_terminal else None  # fmt: skip
    task = bar.add_task(description, total=total, line="") if bar else None

    async def refresh() -> None:
        printed_at = time.monotonic()
        blocking: set[str] = set()
        while True:
            await asyncio.sleep(0.5)
            state.sample()
            has_new, blocking = not client.blocking_servers() <= blocking, client.blocking_servers()
            if bar and task is not None:
                bar.update(task, completed=state.done, line=state.line(), refresh=True)
            elif has_new or time.monotonic() - printed_at >= SECONDS_BETWEEN_LINES:
                printed_at = time.monotonic()
                print(f"{description}: {state.line()}", flush=True)

    if bar:
        bar.start()
    refresher = asyncio.create_task(refresh())
    try:
        yield state
    finally:
        refresher.cancel()
        await asyncio.gather(refresher, return_exceptions=True)
        if bar:
            bar.stop()
