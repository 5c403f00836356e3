"""Shutdown of a process group: all ranks leave together, or after a timeout."""

import multiprocessing
import os
import socket
import time
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
from torch import distributed

from train.loop.shutdown import shutdown_process_group

UNTIL_ANOTHER_LEAVES = -1.0


def _rank(
    rank: int, port: int, delays: dict[int, float], seconds: float, gate: Any, times: "SimpleQueue[tuple]"
) -> None:
    """Join the group, wait for the gate or a delay, and report when this rank arrived at the shutdown and left."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(delays)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    if delays[rank] == UNTIL_ANOTHER_LEAVES:
        gate.wait(60)
    else:
        time.sleep(delays[rank])
    arrived = time.monotonic()
    shutdown_process_group(seconds)
    times.put((rank, arrived, time.monotonic()))
    gate.set()


def _shut_down(delays: dict[int, float], seconds: float) -> dict[int, tuple[float, float]]:
    """Return when each rank arrived and left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.loop.shutdown"])
    times: SimpleQueue[tuple] = context.SimpleQueue()
    gate = context.Event()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, delays, seconds, gate, times)) for rank in delays]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * len(delays)
    return {rank: (arrived, left) for rank, arrived, left in (times.get() for _ in ranks)}


@pytest.mark.parametrize("late", [0, 2])
def test_no_rank_leaves_before_the_last_arrives(late: int) -> None:
    times = _shut_down({rank: 0.5 * (rank == late) for rank in range(3)}, seconds=60)
    last = max(arrived for arrived, _ in times.values())
    assert all(left >= last for _, left in times.values())
    assert max(left for _, left in times.values()) < last + 30  # all have arrived: none waits for its timeout


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_wait_at_most_the_timeout(late: int) -> None:
    times = _shut_down({1 - late: 0.0, late: UNTIL_ANOTHER_LEAVES}, seconds=1)
    arrived, left = times[1 - late]
    assert left - arrived >= 1
    assert left < times[late][0]


def test_a_process_without_a_group_does_not_wait() -> None:
    started = time.monotonic()
    shutdown_process_group()
    assert time.monotonic() - started < 1
