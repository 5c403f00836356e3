"""Rows at work many at a time and handed on in order, and the line that says how far they are."""

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

SECONDS_OF_SPEED = 60.0
"""What tokens/s and the time left are measured over, so that they tell of now, not of a journal read at the start."""


class RequestProgress:
    """How many rows are done, and how fast they and their tokens come."""

    def __init__(self, description: str, total: int | None, client: Client) -> None:
        self.description, self.total, self.client = description, total, client
        self.done = 0
        self._seen: deque[tuple[float, int, int]] = deque()
        self.look()

    def advance(self, rows: int = 1) -> None:
        """So many more rows are done."""
        self.done += rows

    def look(self) -> None:
        """Note how far it is now; the speeds lie between the notes of the last minute."""
        now = time.monotonic()
        self._seen.append((now, self.done, self.client.counts.completion_tokens))
        while self._seen[0][0] < now - SECONDS_OF_SPEED:
            self._seen.popleft()

    def line(self) -> str:
        """Rows, tokens/s, failures, requests in flight, time left, and what the servers have against it."""
        counts = self.client.counts
        (then, rows_then, tokens_then), (now, rows, tokens) = self._seen[0], self._seen[-1]
        seconds = now - then
        of = f" of {self.total:,} rows ({rows / self.total:.0%})" if self.total else " rows"
        parts = [f"{rows:,}{of}", f"{(tokens - tokens_then) / seconds if seconds else 0:,.0f} tokens/s"]
        parts.append(f"{counts.failed:,} failed, {counts.retries:,} tries repeated")
        parts.append(f"{self.client.in_flight:,} in flight")
        if self.total and rows > rows_then:
            parts.append(f"{duration(seconds / (rows - rows_then) * (self.total - rows))} left")
        return "; ".join([", ".join(parts), *self.client.server_messages()])


@asynccontextmanager
async def progress(description: str, total: int | None, client: Client) -> AsyncIterator[RequestProgress]:
    """Show the pace of what runs inside: a bar in a terminal, a line now and then in a log file.

    That a server keeps everyone waiting is told in the log at once.
    """
    pace = RequestProgress(description, total, client)
    console = Console(file=sys.stdout)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(20),
        # Over as many lines as it takes: what the servers have against it stands at its end.
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(overflow="fold")),
        console=console, transient=True, auto_refresh=False,
    ) if console.is_terminal else None  # fmt: skip
    task = bar.add_task(description, total=total, line="") if bar else None

    async def tell() -> None:
        last_line = time.monotonic()
        waited_for: set[str] = set()
        while True:
            await asyncio.sleep(0.5)
            pace.look()
            is_news, waited_for = not client.blocking_servers() <= waited_for, client.blocking_servers()
            if bar and task is not None:
                bar.update(task, completed=pace.done, line=pace.line(), refresh=True)
            elif is_news or time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                print(f"{description}: {pace.line()}", flush=True)

    if bar:
        bar.start()
    teller = asyncio.create_task(tell())
    try:
        yield pace
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)
        if bar:
            bar.stop()
