"""Rows at work many at a time and handed on in order, and the line that says how far they are."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from train.llm.client import Client
from train.progress import SECONDS_BETWEEN_LINES, duration

Row = TypeVar("Row")
Result = TypeVar("Result")

SECONDS_OF_SPEED = 60.0
"""What tokens/s and the time left are measured over, so that they tell of now, not of a journal read at the start."""


async def in_order(
    rows: Iterable[Row], work: Callable[[Row], Awaitable[Result]], *, at_once: int, ahead: int | None = None
) -> AsyncGenerator[Result]:
    """`work(row)` for each row, `at_once` at a time; the results in the order of the rows, each as soon as it may.

    Each row goes through its own stages without waiting for any other, so a server stays full as long as `at_once`
    is some more than the places that the client has (twice as many is plenty). At most `ahead` rows (32 times
    `at_once`) are begun and not yet handed on: that much a slow row may hold back, and that much is held in memory.

    The first exception, of `work` or of `rows`, ends it all: the other rows are cancelled, and it is raised as it
    is, in no group. Take it in `async with contextlib.aclosing(...)` where the loop may be left early.
    """
    ahead = ahead or 32 * at_once
    numbered = iter(rows)
    in_line: deque[asyncio.Task[Result]] = deque()
    at_work: set[asyncio.Task[Result]] = set()
    news = asyncio.Event()
    failure: BaseException | None = None
    exhausted = False

    async def one(row: Row) -> Result:
        return await work(row)

    def begin_more() -> None:
        nonlocal failure, exhausted
        while not (exhausted or failure) and len(at_work) < at_once and len(in_line) < ahead:
            try:
                row = next(numbered)
            except StopIteration:
                exhausted = True
            except Exception as error:
                failure = error
            else:
                task = asyncio.create_task(one(row))
                in_line.append(task)
                at_work.add(task)
                task.add_done_callback(end)

    def end(task: asyncio.Task[Result]) -> None:
        nonlocal failure
        at_work.discard(task)
        if not task.cancelled():
            error = task.exception()  # of each one: asyncio itself tells of those that nobody looks at
            failure = failure or error
        begin_more()  # here, not where results are taken: a slow taker must not let the server run dry
        news.set()

    try:
        begin_more()
        while in_line or failure:
            while in_line and in_line[0].done() and not failure:
                task = in_line.popleft()
                begin_more()
                yield task.result()
            if failure:
                raise failure
            if in_line:
                news.clear()
                if not in_line[0].done():
                    await news.wait()
    finally:
        exhausted = True
        rest = list(at_work)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


class Pace:
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
        parts.append(f"{counts.failed:,} failed, {counts.tries_failed:,} tries repeated")
        parts.append(f"{self.client.in_flight:,} in flight")
        if self.total and rows > rows_then:
            parts.append(f"{duration(seconds / (rows - rows_then) * (self.total - rows))} left")
        return "; ".join([", ".join(parts), *self.client.troubles()])


@asynccontextmanager
async def progress(description: str, total: int | None, client: Client) -> AsyncIterator[Pace]:
    """Show the pace of what runs inside: a bar in a terminal, a line now and then in a log file.

    That a server keeps everyone waiting is told in the log at once.
    """
    pace = Pace(description, total, client)
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
            is_news, waited_for = not client.waits_for() <= waited_for, client.waits_for()
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
