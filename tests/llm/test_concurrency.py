"""Concurrency limits of servers, and the queue for their slots."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.llm.concurrency import Backoff, ConcurrencyLimiter, ServerSlots

NO_PAUSE = Backoff(initial=0.0, longest=0.0)


def slots(max_limit: int, backoff: Backoff = NO_PAUSE) -> ServerSlots:
    return ServerSlots("here", max_limit, backoff)


def rounds(server: ServerSlots, count: int) -> list[int]:
    """Return the limit after each round of answers."""
    limits = []
    for _ in range(count):
        for _ in range(server.limit):
            server.record_answer()
        limits.append(server.limit)
    return limits


def test_the_limit_grows_by_one_two_four() -> None:
    server = slots(64)
    server.limit = 1
    assert rounds(server, 8) == [2, 4, 8, 16, 32, 64, 64, 64]


def test_a_rate_limited_server_keeps_the_limit_of_requests_in_flight() -> None:
    server = slots(64)
    for _ in range(64):
        server.acquire()
    for _ in range(48):  # it takes 16 at once
        server.in_flight -= 1
        server.record_rate_limit("429", 1.0, None)
    assert (server.in_flight, server.limit) == (16, 16)
    assert rounds(server, 1) == [17]  # and then it grows slowly


@pytest.mark.parametrize(("share", "low", "high"), [(0.01, 60, 64), (0.1, 10, 18), (0.5, 2, 4)])
def test_a_share_of_errors_settles_a_little_above_its_inverse(share: float, low: float, high: float) -> None:
    server, rng, limits = slots(64), random.Random(1), []
    for step in range(60_000):
        if rng.random() < share:
            server.record_failure("500", float("inf"))
        else:
            server.record_answer()
        if step > 10_000:
            limits.append(server.limit)
    assert low <= sum(limits) / len(limits) <= high


def test_errors_of_requests_in_flight_together_count_once() -> None:
    server = slots(64, Backoff(initial=1_000.0, longest=8_000.0))
    for _ in range(64):
        server.record_failure("gone", 1.0)
    assert (server.limit, server.paused_until) == (1, 0.0)
    pauses = []
    for _ in range(6):
        before = server.heard_at
        server.record_failure("gone", float("inf"))
        pauses.append(server.paused_until - max(before, server.heard_at))
    for pause, longest in zip(pauses, (1_000, 2_000, 4_000, 8_000, 8_000, 8_000), strict=True):
        assert pause <= longest
    assert pauses[3] >= 4_000
    server.record_answer()
    assert server.last_error is None


class SteppingClock:
    """A clock that advances by a second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_a_pause_that_ends_during_dispatch_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        server = slots(1)
        monkeypatch.setattr("train.llm.concurrency.time", clock := SteppingClock())
        # The first reading in `acquire` and in `dispatch` finds it paused, the next does not.
        server.paused_until = clock.now + 2.01
        assert await asyncio.wait_for(ConcurrencyLimiter([server]).acquire(), timeout=5) is server

    asyncio.run(work())


@given(st.lists(st.sampled_from(["acquire", "answered", "refused", "failed", "cancelled"])), st.integers(1, 5))
def test_the_limit_stays_between_one_and_the_bound(events: list[str], max_limit: int) -> None:
    server = slots(max_limit)
    for event in events:
        if event == "acquire":
            if not server.has_free_slot(float("inf")):
                continue
            server.acquire()
        elif server.in_flight:
            server.in_flight -= 1
            if event == "answered":
                server.record_answer()
            elif event == "refused":
                server.record_rate_limit("429", float("inf"), None)
            elif event == "failed":
                server.record_failure("500", float("inf"))
        assert 1 <= server.limit <= max_limit
        assert 0 <= server.in_flight <= max_limit


def test_slots_go_to_the_longest_waiting_and_a_cancel_loses_none() -> None:
    async def run() -> list[int]:
        limiter = ConcurrencyLimiter([slots(1)])
        first = await limiter.acquire()
        order: list[int] = []

        async def wait(number: int) -> None:
            server = await limiter.acquire()
            order.append(number)
            limiter.release(server)
            limiter.dispatch()

        tasks = [asyncio.create_task(wait(number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # while it waits
        limiter.release(first)
        limiter.dispatch()
        tasks[0].cancel()  # as its slot is assigned
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limiter.servers[0].in_flight == 0
        return order

    assert asyncio.run(run()) == [2, 3, 4]


def test_the_server_with_most_free_slots_is_next_and_the_failed_one_last() -> None:
    async def run() -> None:
        small, large = slots(2), slots(4)
        limiter = ConcurrencyLimiter([small, large])
        servers = [await limiter.acquire() for _ in range(6)]
        assert [servers.count(small), servers.count(large)] == [2, 4]
        assert servers[1] is large
        limiter.release(small)
        limiter.release(large)
        assert await limiter.acquire(avoid=large) is small
        assert await limiter.acquire(avoid=large) is large  # better than waiting

    asyncio.run(run())
