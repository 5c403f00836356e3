"""Processes that a test kills, and none of which outlives it."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

from scripted_server import Asked, Reply, Script, ScriptedServer


@contextmanager
def killed_afterwards(processes: ForkServerContext) -> Iterator[Callable[..., BaseProcess]]:
    """Yield a function that starts a process with a target and its arguments; all are killed at the end."""
    started: list[BaseProcess] = []

    def begin(target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = processes.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def kill_at_requests(
    moments: Iterable[int], server: ScriptedServer, start: Callable[[], BaseProcess]
) -> Iterator[None]:
    """Start a process for each moment, kill it when the server has had that many requests, and yield.

    Each process gets as far as one request at least.
    """
    for moment in moments:
        enough = max(moment, len(server.asked) + 1)
        process = start()
        while len(server.asked) < enough and process.is_alive():
            time.sleep(0.001)
        assert process.is_alive()
        process.kill()
        process.join()
        yield


def after_a_moment(script: Script) -> Script:
    """Return a script that answers after 10 ms, so that requests are on their way at a kill."""

    async def slow(asked: Asked) -> Reply:
        await asyncio.sleep(0.01)
        return await script(asked)

    return slow
