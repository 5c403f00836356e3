import multiprocessing
import os
import socket
import time
from multiprocessing.queues import SimpleQueue

import pytest
from torch import distributed

from train.loop.shutdown import shutdown_process_group


def _rank(rank: int, port: int, behind: dict[int, float], seconds: float, times: "SimpleQueue[tuple]") -> None:
    """Joins the group, is `behind`, and says when it came to leave and when it left."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(behind)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    time.sleep(behind[rank])
    came = time.monotonic()
    shutdown_process_group(seconds)
    times.put((rank, came, time.monotonic()))


def _left(behind: dict[int, float], seconds: float) -> dict[int, tuple[float, float]]:
    """When each rank came and left, for those that did both."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.loop.shutdown"])
    times: SimpleQueue[tuple] = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, behind, seconds, times)) for rank in behind]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * len(behind)
    return {rank: (came, left) for rank, came, left in (times.get() for _ in ranks)}


@pytest.mark.parametrize("late", [0, 2])
def test_nobody_leaves_before_the_last_has_come(late: int) -> None:
    times = _left({rank: 1.0 * (rank == late) for rank in range(3)}, seconds=60)
    last = max(came for came, _ in times.values())
    assert all(left >= last for _, left in times.values())
    assert max(left for _, left in times.values()) < last + 30  # as they were all there, none waits out its time


@pytest.mark.parametrize("late", [0, 1])
def test_one_that_does_not_come_is_waited_for_so_long(late: int) -> None:
    times = _left({rank: 10.0 * (rank == late) for rank in range(2)}, seconds=2)
    came, left = times[1 - late]
    assert left - came >= 2
    assert left < times[late][0]


def test_without_a_group_there_is_nobody_to_wait_for() -> None:
    started = time.monotonic()
    shutdown_process_group()
    assert time.monotonic() - started < 1
