"""Concurrent work on rows with ordered results, and the progress line."""

import asyncio
import gc
import random
import re
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.errors import UserError
from train.llm import progress as rows_module
from train.llm.client import Counts
from train.llm.ordered_map import map_ordered
from train.llm.progress import RequestProgress, progress


def test_results_come_in_order_however_long_each_row_takes() -> None:
    rng = random.Random(3)
    turns = [rng.randrange(20) for _ in range(500)]

    async def work(row: int) -> int:
        for _ in range(turns[row]):
            await asyncio.sleep(0)
        return row * row

    async def run() -> list[int]:
        return [result async for result in map_ordered(range(500), work, at_once=17)]

    assert asyncio.run(run()) == [row * row for row in range(500)]


def test_rows_do_not_wait_for_each_others_stages_and_ahead_bounds_them() -> None:
    started, running, most_running = 0, 0, 0
    held = asyncio.Event()

    def source() -> Iterator[int]:
        nonlocal started
        for row in range(1_000):
            started += 1
            yield row

    async def work(row: int) -> int:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        if row == 0:
            await held.wait()
        await asyncio.sleep(0)
        running -= 1
        return row

    async def let_go() -> None:
        while (started, running) != (50, 1):  # every row that may be started is done, except for the first
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert started == 50
        held.set()

    async def run() -> list[int]:
        letting_go = asyncio.create_task(let_go())
        results = [result async for result in map_ordered(source(), work, at_once=8, ahead=50)]
        await letting_go
        return results

    assert asyncio.run(run()) == list(range(1_000))
    assert most_running == 8


def test_a_slow_consumer_does_not_stop_the_work() -> None:
    done = 0

    async def work(row: int) -> int:
        nonlocal done
        await asyncio.sleep(0)
        done += 1
        return row

    async def run() -> None:
        async with aclosing(map_ordered(range(1_000), work, at_once=4, ahead=100)) as coming:
            await anext(coming)
            while done < 100:  # never ends if rows are started only while a result is awaited
                await asyncio.sleep(0)

    asyncio.run(run())


@pytest.mark.parametrize("where", ["work", "rows"])
def test_the_first_error_is_raised_unchanged_and_cancels_the_rest(where: str) -> None:
    def source() -> Iterator[int]:
        yield from range(10)
        if where == "rows":
            raise UserError("row 10 is broken")

    async def work(row: int) -> int:
        if row == 9 and where == "work":
            raise UserError("the key is wrong")
        if row not in (5, 6):
            await asyncio.Event().wait()
        return row

    async def run() -> None:
        before = asyncio.all_tasks()
        with pytest.raises(UserError, match="the key is wrong" if where == "work" else "row 10 is broken"):
            async for _ in map_ordered(source(), work, at_once=9):
                pass
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(run(), 30))


def test_leaving_early_cancels_running_rows() -> None:
    async def run() -> int:
        ended = 0

        async def work(row: int) -> int:
            nonlocal ended
            try:
                await asyncio.sleep(0 if row == 0 else 3600)
            finally:
                ended += 1
            return row

        async with aclosing(map_ordered(range(100), work, at_once=10)) as coming:
            assert await anext(coming) == 0
            await asyncio.sleep(0)  # the row after it has started too
        return ended

    assert asyncio.run(run()) == 11


def a_client() -> SimpleNamespace:
    return SimpleNamespace(
        counts=Counts(),
        in_flight=64,
        server_messages=lambda: ["http://a/v1: 429 Busy, for 3s"],
        blocking_servers=lambda: set(),
    )


def test_the_line_shows_rows_speed_failures_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(rows_module.time, "monotonic", lambda: now)
    client = a_client()
    bar = RequestProgress("sysgen", 1_000, client)
    bar.advance(400)  # from the journal, at once
    now += 1
    bar.sample()
    for _ in range(100):  # then one row a second, of 250 tokens
        now += 1
        bar.advance()
        client.counts.completion_tokens += 250
        bar.sample()
    client.counts.failed, client.counts.retries = 2, 17
    assert bar.line() == (
        "500 of 1,000 rows (50%), 250 tokens/s, 2 failed, 17 retries, 64 in flight, 8m20s left; "
        "http://a/v1: 429 Busy, for 3s"
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_line_is_shown_while_it_runs(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(rows_module, "SECONDS_BETWEEN_LINES", 0.0)

    async def run() -> None:
        async with progress("sysgen", 10, a_client()) as bar:
            bar.advance(4)
            while True:
                await asyncio.sleep(0.01)
                if "4 of 10 rows (40%)" in capsys.readouterr().out:
                    return

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_narrow_terminal_shows_complete_server_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    client = a_client()
    message = "http://a/v1: 429 Too Many Requests: wait for your turn, for 3s, next try in 59m57s"
    client.server_messages = lambda: [message]

    async def run() -> None:
        shown = ""
        async with progress("sysgen", 10, client):
            while "59m57s" not in shown:
                await asyncio.sleep(0.01)
                shown += "".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).split())
        assert "".join(message.split()) in shown.replace("━", "")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_of_rows_that_fail_together_one_error_is_raised_and_asyncio_warns_of_none() -> None:
    complaints: list[dict[str, Any]] = []

    async def everything() -> None:
        together = asyncio.Event()

        async def work(row: int) -> int:
            await together.wait()
            raise ValueError(row)

        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        asyncio.get_running_loop().call_soon(together.set)
        with pytest.raises(ValueError, match=r"^0$"):
            async for _ in map_ordered(range(8), work, at_once=4):
                pass
        gc.collect()

    asyncio.run(everything())
    assert complaints == []
