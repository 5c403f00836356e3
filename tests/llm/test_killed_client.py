"""Runs that are killed, interrupted, or very long: the requests at the server, and the files."""

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import client_process
import pytest
from client_process import STAGES
from killed_processes import killed_afterwards
from scripted_server import Asked, Reply, chat_reply, served

from train.llm.concurrency import Backoff, ConcurrencyLimiter, ServerSlots

ROWS = 125
REQUESTS = ROWS * STAGES
CONCURRENCY = 16
KILLS = 20

processes = multiprocessing.get_context("forkserver")  # its children start with the slow imports done
processes.set_forkserver_preload(["train.llm.progress"])


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Return a function that starts a process of client_process; all are killed after the test."""
    with killed_afterwards(processes) as begin:
        yield begin


class Memory:
    """A script that records its answers to each prompt; with `varied`, another answer each time."""

    def __init__(self, varied: bool) -> None:
        self.varied = varied
        self.said: dict[str, list[str]] = defaultdict(list)
        self.enough = 10**9
        self.was_enough = False

    async def __call__(self, asked: Asked) -> Reply:
        await asyncio.sleep(0.02)
        text = f"({asked.prompt[:60]})" + (f" {asked.times}" if self.varied else "")
        self.said[asked.prompt].append(text)
        self.was_enough |= asked.number >= self.enough
        return chat_reply(text)


def journal_size(folder: Path) -> int:
    with sqlite3.connect(folder / "answers.sqlite") as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


def max_uncommitted(concurrency: int) -> int:
    """Return the bound of the client: 25% more than the slots."""
    promised = concurrency + concurrency // 4
    assert ConcurrencyLimiter([ServerSlots("here", concurrency, Backoff())]).max_uncommitted == promised
    return promised


@pytest.mark.parametrize("varied", [False, True])
def test_twenty_kills_lose_nothing_and_repeat_next_to_nothing(
    tmp_path: Path, varied: bool, start: Callable[..., multiprocessing.process.BaseProcess]
) -> None:
    script, rng = Memory(varied), random.Random(5)
    moments = sorted(rng.sample(range(1, REQUESTS), KILLS))
    lost = []
    with served(script) as server:
        for moment in moments:
            # The moment is measured at the server, in requests that have arrived, with repeated ones.
            script.enough, script.was_enough = moment + sum(lost), False
            process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
            while not script.was_enough and process.is_alive():
                time.sleep(0.0005)
            process.kill()
            process.join()
            if (tmp_path / "answers.sqlite").exists():
                written = journal_size(tmp_path)
                lost.append(server.answered.total() - written - sum(lost))
        process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
        process.join(60)
        assert process.exitcode == 0
        asked, output = len(server.asked), (tmp_path / "out.jsonl").read_bytes()
        process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
        process.join(60)
        assert process.exitcode == 0
        assert len(server.asked) == asked  # nothing is asked again
        assert (tmp_path / "out.jsonl").read_bytes() == output
    assert process.exitcode == 0

    # Each kill loses at most the uncommitted answers, and only lost ones are answered twice.
    assert len(lost) >= KILLS - 1
    assert max(lost) <= max_uncommitted(CONCURRENCY)
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) == ROWS
    chain = {f"{stage}: {texts[stage]}": texts[stage + 1] for texts in rows for stage in range(STAGES)}
    if varied:
        # No answer was used and then lost: every request at the server belongs to the final rows.
        assert set(script.said) == set(chain)
        assert all(text in script.said[prompt] for prompt, text in chain.items())
    else:
        expected = []
        for row in range(ROWS):
            texts = [f"row {row}"]
            for stage in range(STAGES):
                texts.append(f"({f'{stage}: {texts[-1]}'[:60]})")
            expected.append(texts)
        assert rows == expected
    repeated = server.answered.total() - REQUESTS
    assert repeated == sum(lost)
    print(f"answers that the server gave twice, over {KILLS} kills: {repeated}")


def test_answers_in_the_journal_are_not_asked_again(
    tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]
) -> None:
    """Answers that a killed process had stored are not asked of the server again."""
    script = Memory(varied=False)
    with served(script) as server:
        script.enough = 200
        process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
        while not script.was_enough:
            time.sleep(0.0005)
        process.kill()
        process.join()
        written = journal_size(tmp_path)
        before = len(server.asked)
        process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
        process.join(60)
        assert len(server.asked) - before == REQUESTS - written


def test_ctrl_c_ends_at_once_and_cleanly(
    tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]
) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.number >= 100:
            await asyncio.Event().wait()  # a server that never answers
        return chat_reply(asked.prompt)

    with served(script) as server:
        process = start(client_process.run, server.url, tmp_path, ROWS, CONCURRENCY)
        while server.in_flight < CONCURRENCY:
            time.sleep(0.001)
        assert process.pid
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 130
        assert (tmp_path / "stderr").read_text() == ""
        assert journal_size(tmp_path) == 100 == server.answered.total()


def test_memory_is_flat(tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]) -> None:
    reply = chat_reply("ok " * 1_000)

    async def script(asked: Asked) -> Reply:
        return reply

    results = processes.Queue()
    peaks = []
    with served(script) as server:
        for rows in (500, 3_500):
            folder = tmp_path / str(rows)
            folder.mkdir()
            start(client_process.peak_memory, server.url, folder, rows, results)
            peaks.append(results.get(timeout=120))
            server.asked.clear()
    assert peaks[1] - peaks[0] < 4 * 2**20
