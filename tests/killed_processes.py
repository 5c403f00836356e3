"""Processes that a test kills, and none of which outlives it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess


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
