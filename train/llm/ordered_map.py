"""Concurrent map over rows, with results in the order of the rows."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")


async def map_ordered(
    rows: Iterable[Row], work: Callable[[Row], Awaitable[Result]], *, at_once: int, ahead: int | None = None
) -> AsyncGenerator[Result]:
    """Yield `work(row)` for each row, in order, each as soon as all before it are done.

    Each row runs through its stages without waiting for others, so a server stays busy if `at_once` is above the
    client's concurrency (twice as many is plenty). The first exception, of `work` or of `rows`, cancels the other rows
    and is raised as it is, in no group. Use `async with contextlib.aclosing(...)` if the loop may be left early.

    Args:
        at_once: rows at work.
        ahead: rows begun and not yet yielded, 32 times `at_once` by default: the number that one slow row can hold
            back, all in memory.
    """
    ahead = ahead or 32 * at_once
    remaining = iter(rows)
    pending: deque[asyncio.Task[Result]] = deque()
    running: set[asyncio.Task[Result]] = set()
    progress = asyncio.Event()
    failure: BaseException | None = None
    exhausted = False

    async def run(row: Row) -> Result:
        return await work(row)

    def start_more() -> None:
        nonlocal failure, exhausted
        while not (exhausted or failure) and len(running) < at_once and len(pending) < ahead:
            try:
                row = next(remaining)
            except StopIteration:
                exhausted = True
            except Exception as error:
                failure = error
            else:
                task = asyncio.create_task(run(row))
                pending.append(task)
                running.add(task)
                task.add_done_callback(end)

    def end(task: asyncio.Task[Result]) -> None:
        nonlocal failure
        running.discard(task)
        if not task.cancelled():
            error = task.exception()  # of every task: asyncio warns of exceptions that nobody reads
            failure = failure or error
        start_more()  # here, not where results are taken: a slow consumer must not let the server idle
        progress.set()

    try:
        start_more()
        while pending or failure:
            while pending and pending[0].done() and not failure:
                task = pending.popleft()
                start_more()
                yield task.result()
            if failure:
                raise failure
            if pending:
                progress.clear()
                if not pending[0].done():
                    await progress.wait()
    finally:
        exhausted = True
        cancelled = list(running)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
