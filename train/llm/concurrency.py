"""How many requests each server gets at once, learned from what it answers, and who is next.

A server starts with all the places it may have, as an idle one can take them, and loses some when it objects:

- Too much (429, 503): it keeps as many places as it has accepted requests at that moment, which is what it bears.
- A fault (500, a dropped connection, garbage, an answer that it breaks off): one place less. Where a share e of the
  answers are faults, that settles somewhat above 1/e places: one in a hundred leaves 64 alone, one in ten leaves about
  fifteen.
- Places come back after each round of answers (as many as there are places) without an objection: one, then two,
  then four. So a server at its limit is asked for too much about once a round, and one that was away is full again
  within a few rounds.
- Objections with no answer between them pause the server, for longer each time; Retry-After pauses it as long as it
  says. Objections to requests that were on their way together count once. Without a Retry-After no pause is longer than
  a quarter of the time since the last answer: a gateway that refuses nine of ten requests still answers the tenth. An
  answer that it breaks off does not pause it.
"""

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

SHARE_OF_ABSENCE = 0.25
"""Longest pause of a server that has answered, as a share of the time since its last answer."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before asking again, in seconds: `first`, doubled with each failure up to `longest`."""

    first: float = 0.5
    longest: float = 60.0

    def after(self, failures: int) -> float:
        """The pause after so many failures in a row: half of it certain, half by chance, so that no crowd returns."""
        return min(self.longest, self.first * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


class ServerSlots:
    """One server's places. `limit` is how many it has now, between 1 and `most`."""

    def __init__(self, name: str, most: int, backoff: Backoff) -> None:
        self.name, self.most, self.backoff = name, most, backoff
        self.limit = most
        self.in_flight = 0
        self.heard_at = time.monotonic()
        """When it last said anything, or was asked after a rest."""
        self.paused_until = 0.0
        self.pause_reason = ""
        """Its words when it was last paused. Answers that were under way come during a pause, and don't end it."""
        self.closed = ""
        """The reason that it is asked nothing more; empty while it is asked."""
        self.rests = False
        """True while it gets no request until a look at it hears something."""
        self.trouble: str | None = None
        """Its last objection, until it answers again."""
        self.trouble_since = 0.0
        self.failures_in_a_row = 0
        self._failed_at = 0.0
        self._answered_at = float("-inf")
        self._clean_answers = 0
        self._growth = 1

    def take(self) -> None:
        """One more request is on its way."""
        if self.in_flight == 0:
            self.heard_at = time.monotonic()
        self.in_flight += 1

    def answered(self) -> None:
        """A request was answered (and its place given back)."""
        self.heard_at = self._answered_at = time.monotonic()
        self.trouble = None
        self.failures_in_a_row = 0
        self._clean_answers += 1
        if self._clean_answers >= self.limit:
            self._clean_answers = 0
            self.limit = min(self.most, self.limit + self._growth)
            self._growth = min(self._growth * 2, self.most)

    def refused(self, what: str, sent_at: float, retry_after: float | None) -> None:
        """It has too much to do; `retry_after` seconds if it said how long."""
        self.limit = max(1, min(self.limit, self.in_flight))
        self._clean_answers = 0
        self.objected(what, sent_at)
        if retry_after is not None:
            after = time.monotonic() + retry_after + self.backoff.first * random.random()
            self.paused_until, self.pause_reason = max(self.paused_until, after), what

    def failed(self, what: str, sent_at: float) -> None:
        """It failed over a request, or can't be reached."""
        self.limit = max(1, self.limit - 1)
        self.objected(what, sent_at)

    def broke_off(self) -> None:
        """It began an answer and did not end it: one place less, and no pause, as it does answer."""
        self.heard_at = time.monotonic()
        self.limit = max(1, self.limit - 1)
        self._growth = 1

    def objected(self, what: str, sent_at: float) -> None:
        """It has answered with an objection; the second in a row pauses it."""
        now = time.monotonic()
        self.heard_at = now
        self._growth = 1
        if self.trouble is None:
            self.trouble_since = now
        self.trouble = what
        if sent_at < self._failed_at:
            return  # it was on its way when another one failed: the same event
        self.failures_in_a_row += 1
        self._failed_at = now
        if self.failures_in_a_row > 1:
            longest = max(self.backoff.first, SHARE_OF_ABSENCE * (now - self._answered_at))
            pause = min(longest, self.backoff.after(self.failures_in_a_row - 1))
            self.paused_until, self.pause_reason = max(self.paused_until, now + pause), what

    def is_open(self, now: float) -> bool:
        """Whether it may get one more request."""
        return self.in_flight < self.limit and self.paused_until <= now and not (self.closed or self.rests)


AnyLane = TypeVar("AnyLane", bound=ServerSlots)


class ConcurrencyLimiter(Generic[AnyLane]):
    """Hands out the lanes' places, first come, first served; always the lane with the largest share free.

    So a slow server gets what it can bear and no more, a dead one a request now and then, and neither keeps the
    others waiting.

    A place is free again as soon as its answer has come, as the server is to be kept busy while that is written
    down. Answers that are not yet written are counted all the same: with the requests in flight there are never
    more of them than `max_uncommitted`, a quarter more than there are places. This many a killed process can lose.
    """

    def __init__(self, lanes: list[AnyLane]) -> None:
        self.lanes = lanes
        self.uncommitted = 0
        places = sum(lane.most for lane in lanes)
        self.max_uncommitted = places + max(1, places // 4)
        self._waiting: deque[tuple[asyncio.Future[AnyLane], AnyLane | None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    async def take(self, avoid: AnyLane | None = None) -> AnyLane:
        """Wait for a place; on another lane than `avoid` if there is one free."""
        if not self._waiting and (lane := self._best(avoid, time.monotonic())):
            lane.take()
            return lane
        mine: asyncio.Future[AnyLane] = asyncio.get_running_loop().create_future()
        self._waiting.append((mine, avoid))
        self.dispatch()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # the place came in the same moment
                self.release(mine.result())
                self.dispatch()
            raise

    def release(self, lane: AnyLane) -> None:
        """The request has ended. What the lane learns from it is told to it next, and then comes `dispatch`."""
        lane.in_flight -= 1

    def dispatch(self) -> None:
        """Give the places that are free to those that wait."""
        now = time.monotonic()  # one look: a pause that ends after `_best` has seen it would set no alarm
        while self._waiting:
            mine, avoid = self._waiting[0]
            if not mine.done():
                lane = self._best(avoid, now)
                if lane is None:
                    break
                lane.take()
                mine.set_result(lane)
            self._waiting.popleft()
        self._set_alarm(now)

    def _best(self, avoid: AnyLane | None, now: float) -> AnyLane | None:
        if self.uncommitted + sum(lane.in_flight for lane in self.lanes) >= self.max_uncommitted:
            return None
        free = [lane for lane in self.lanes if lane.is_open(now)]
        return min(free, key=lambda lane: (lane is avoid, lane.in_flight / lane.limit), default=None)

    def _set_alarm(self, now: float) -> None:
        """Hand out again when the next pause ends, if anyone waits for that."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        paused = [lane.paused_until - now for lane in self.lanes if lane.paused_until > now]
        if self._waiting and paused:
            self._alarm = asyncio.get_running_loop().call_later(min(paused) + 0.001, self.dispatch)
