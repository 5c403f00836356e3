"""TODO: train.llm.ordered_map."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

Row = TypeVar("Row")


Result = TypeVar("Result")


async def map_ordered(
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
