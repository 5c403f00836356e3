"""How many requests a server gets, by what it answered."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.llm.concurrency import Backoff, ConcurrencyLimiter, ServerSlots

NO_PAUSE = Backoff(first=0.0, longest=0.0)


def lane(most: int, backoff: Backoff = NO_PAUSE) -> ServerSlots:
    return ServerSlots("here", most, backoff)


def rounds(server: ServerSlots, count: int) -> list[int]:
    """The limit after each of so many rounds of answers."""
    seen = []
    for _ in range(count):
        for _ in range(server.limit):
            server.answered()
        seen.append(server.limit)
    return seen


def test_places_come_back_by_one_two_four() -> None:
    server = lane(64)
    server.limit = 1
    assert rounds(server, 8) == [2, 4, 8, 16, 32, 64, 64, 64]


def test_a_server_that_refuses_keeps_as_many_places_as_it_accepted() -> None:
    server = lane(64)
    for _ in range(64):
        server.take()
    for _ in range(48):  # it takes 16 at once
        server.in_flight -= 1
        server.refused("429", 1.0, None)
    assert (server.in_flight, server.limit) == (16, 16)
    assert rounds(server, 1) == [17]  # and then carefully


@pytest.mark.parametrize(("share", "low", "high"), [(0.01, 60, 64), (0.1, 10, 18), (0.5, 2, 4)])
def test_a_share_of_faults_settles_somewhat_above_its_inverse(share: float, low: float, high: float) -> None:
    server, chance, limits = lane(64), random.Random(1), []
    for step in range(60_000):
        if chance.random() < share:
            server.failed("500", float("inf"))
        else:
            server.answered()
        if step > 10_000:
            limits.append(server.limit)
    assert low <= sum(limits) / len(limits) <= high


def test_objections_to_requests_that_were_on_their_way_together_count_once() -> None:
    server = lane(64, Backoff(first=1_000.0, longest=8_000.0))
    for _ in range(64):
        server.failed("gone", 1.0)
    assert (server.limit, server.paused_until) == (1, 0.0)
    backoff = []
    for _ in range(6):
        before = server.heard_at
        server.failed("gone", float("inf"))
        backoff.append(server.paused_until - max(before, server.heard_at))
    for pause, whole in zip(backoff, (1_000, 2_000, 4_000, 8_000, 8_000, 8_000), strict=True):
        assert pause <= whole
    assert backoff[3] >= 4_000
    server.answered()
    assert server.trouble is None


class SteppingClock:
    """A second passes each time one looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_a_pause_that_ends_while_places_are_handed_out_leaves_no_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        server = lane(1)
        monkeypatch.setattr("train.llm.concurrency.time", clock := SteppingClock())
        # The first look of `take` and the first of `dispatch` find it paused, the next one does not.
        server.paused_until = clock.now + 2.01
        assert await asyncio.wait_for(ConcurrencyLimiter([server]).take(), timeout=5) is server

    asyncio.run(work())


@given(st.lists(st.sampled_from(["take", "answered", "refused", "failed", "cancelled"])), st.integers(1, 5))
def test_the_limit_stays_between_one_and_the_bound(events: list[str], most: int) -> None:
    server = lane(most)
    for event in events:
        if event == "take":
            if not server.is_open(float("inf")):
                continue
            server.take()
        elif server.in_flight:
            server.in_flight -= 1
            if event == "answered":
                server.answered()
            elif event == "refused":
                server.refused("429", float("inf"), None)
            elif event == "failed":
                server.failed("500", float("inf"))
        assert 1 <= server.limit <= most
        assert 0 <= server.in_flight <= most


def test_whoever_waits_longest_is_next_and_a_place_is_never_lost_by_a_cancel() -> None:
    async def run() -> list[int]:
        places = ConcurrencyLimiter([lane(1)])
        first = await places.take()
        order: list[int] = []

        async def wait(number: int) -> None:
            taken = await places.take()
            order.append(number)
            places.release(taken)
            places.dispatch()

        tasks = [asyncio.create_task(wait(number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # while it waits
        places.release(first)
        places.dispatch()
        tasks[0].cancel()  # as the place is handed to it
        await asyncio.gather(*tasks, return_exceptions=True)
        assert places.lanes[0].in_flight == 0
        return order

    assert asyncio.run(run()) == [2, 3, 4]


def test_the_emptiest_server_is_asked_and_the_one_that_failed_last() -> None:
    async def run() -> None:
        small, large = lane(2), lane(4)
        places = ConcurrencyLimiter([small, large])
        taken = [await places.take() for _ in range(6)]
        assert [taken.count(small), taken.count(large)] == [2, 4]
        assert taken[1] is large
        places.release(small)
        places.release(large)
        assert await places.take(avoid=large) is small
        assert await places.take(avoid=large) is large  # better than waiting

    asyncio.run(run())
