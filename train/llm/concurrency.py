"""Adaptive concurrency: the number of requests each server gets at once, and the queue of those that wait.

A server starts with its full concurrency limit, since an idle server can take it. What it answers changes the limit:

- On 429/503: reduce the limit to the number of requests in flight.
- On an error (500, a dropped connection, garbage, an incomplete answer): reduce the limit by one. With a share e of
  errors among the answers this settles a little above 1/e slots: 1% of errors leave 64 unchanged, 10% leave about 15.
- After each round of answers (as many as the limit) without an error: add one slot, then two, then four. A server at
  its limit is overloaded about once a round, and a server that was away is at full concurrency within a few rounds.
- Errors with no answer in between pause the server, for longer each time; Retry-After sets the pause. Errors of
  requests that were in flight together count once. Without a Retry-After, a pause is at most a quarter of the time
  since the last answer: a gateway that refuses nine of ten requests still answers the tenth. An incomplete answer does
  not pause the server.
"""

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

PAUSE_SHARE = 0.25
"""Longest pause of a server that has answered, as a share of the time since its last answer."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter: `initial` seconds, doubled with each failure up to `longest`."""

    initial: float = 0.5
    longest: float = 60.0

    def delay(self, failures: int) -> float:
        """Return the delay after this many failures in a row; half of it is random, so that retries spread out."""
        return min(self.longest, self.initial * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)


class ServerSlots:
    """The request slots of one server: `limit` of them now, between 1 and `max_limit`."""

    def __init__(self, name: str, max_limit: int, backoff: Backoff) -> None:
        self.name, self.max_limit, self.backoff = name, max_limit, backoff
        self.limit = max_limit
        self.in_flight = 0
        self.heard_at = time.monotonic()
        """Time of its last response, or of the first request after an idle period."""
        self.paused_until = 0.0
        self.pause_reason = ""
        """The error that paused it. Answers to requests already in flight arrive during a pause and don't end it."""
        self.closed = ""
        """The reason why it gets no more requests; empty while it does."""
        self.suspended = False
        """True while it gets no request until a probe gets a response."""
        self.last_error: str | None = None
        """Its last error message; None after an answer."""
        self.failing_since = 0.0
        self.failures_in_a_row = 0
        self._failed_at = 0.0
        self._answered_at = float("-inf")
        self._clean_answers = 0
        self._growth = 1

    def acquire(self) -> None:
        """Count one more request in flight."""
        if self.in_flight == 0:
            self.heard_at = time.monotonic()
        self.in_flight += 1

    def record_answer(self) -> None:
        """Count an answer, and grow the limit after a clean round. The slot was released before."""
        self.heard_at = self._answered_at = time.monotonic()
        self.last_error = None
        self.failures_in_a_row = 0
        self._clean_answers += 1
        if self._clean_answers >= self.limit:
            self._clean_answers = 0
            self.limit = min(self.max_limit, self.limit + self._growth)
            self._growth = min(self._growth * 2, self.max_limit)

    def record_rate_limit(self, message: str, sent_at: float, retry_after: float | None) -> None:
        """Reduce the limit to the requests in flight, and pause for `retry_after` seconds if given."""
        self.limit = max(1, min(self.limit, self.in_flight))
        self._clean_answers = 0
        self.record_error(message, sent_at)
        if retry_after is not None:
            after = time.monotonic() + retry_after + self.backoff.initial * random.random()
            self.paused_until, self.pause_reason = max(self.paused_until, after), message

    def record_failure(self, message: str, sent_at: float) -> None:
        """Reduce the limit by one after a failed request or connection."""
        self.limit = max(1, self.limit - 1)
        self.record_error(message, sent_at)

    def record_incomplete(self) -> None:
        """Reduce the limit by one after an incomplete answer. No pause: the server does answer."""
        self.heard_at = time.monotonic()
        self.limit = max(1, self.limit - 1)
        self._growth = 1

    def record_error(self, message: str, sent_at: float) -> None:
        """Note an error; the second in a row pauses the server."""
        now = time.monotonic()
        self.heard_at = now
        self._growth = 1
        if self.last_error is None:
            self.failing_since = now
        self.last_error = message
        if sent_at < self._failed_at:
            return  # in flight when another request failed: the same event
        self.failures_in_a_row += 1
        self._failed_at = now
        if self.failures_in_a_row > 1:
            longest = max(self.backoff.initial, PAUSE_SHARE * (now - self._answered_at))
            pause = min(longest, self.backoff.delay(self.failures_in_a_row - 1))
            self.paused_until, self.pause_reason = max(self.paused_until, now + pause), message

    def has_free_slot(self, now: float) -> bool:
        """Return True if it may get one more request."""
        return self.in_flight < self.limit and self.paused_until <= now and not (self.closed or self.suspended)


AnyServer = TypeVar("AnyServer", bound=ServerSlots)


class ConcurrencyLimiter(Generic[AnyServer]):
    """A first-come, first-served queue for slots; each request gets the server with the largest share of free slots.

    A slow server gets no more than it can take, an unreachable one gets a request now and then, and neither keeps the
    others waiting.

    A slot is free as soon as its answer has arrived, so the server stays busy while the journal commits. Requests in
    flight plus uncommitted answers never exceed `max_uncommitted` (25% above the sum of limits): a killed process
    loses at most that many.
    """

    def __init__(self, servers: list[AnyServer]) -> None:
        self.servers = servers
        self.uncommitted = 0
        slots = sum(server.max_limit for server in servers)
        self.max_uncommitted = slots + max(1, slots // 4)
        self._waiting: deque[tuple[asyncio.Future[AnyServer], AnyServer | None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    async def acquire(self, avoid: AnyServer | None = None) -> AnyServer:
        """Wait for a slot and take it; on another server than `avoid` if one is free."""
        if not self._waiting and (server := self._select(avoid, time.monotonic())):
            server.acquire()
            return server
        future: asyncio.Future[AnyServer] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, avoid))
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # the slot was assigned at the same moment
                self.release(future.result())
                self.dispatch()
            raise

    def release(self, server: AnyServer) -> None:
        """Free the slot of a request that has ended. Record its result on the server next, then call `dispatch`."""
        server.in_flight -= 1

    def dispatch(self) -> None:
        """Assign free slots to those that wait."""
        now = time.monotonic()  # read once: a pause that ends after `_select` has seen it would set no alarm
        while self._waiting:
            future, avoid = self._waiting[0]
            if not future.done():
                server = self._select(avoid, now)
                if server is None:
                    break
                server.acquire()
                future.set_result(server)
            self._waiting.popleft()
        self._set_alarm(now)

    def _select(self, avoid: AnyServer | None, now: float) -> AnyServer | None:
        if self.uncommitted + sum(server.in_flight for server in self.servers) >= self.max_uncommitted:
            return None
        free = [server for server in self.servers if server.has_free_slot(now)]
        return min(free, key=lambda server: (server is avoid, server.in_flight / server.limit), default=None)

    def _set_alarm(self, now: float) -> None:
        """Dispatch again when the next pause ends, if anyone waits."""
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        pauses = [server.paused_until - now for server in self.servers if server.paused_until > now]
        if self._waiting and pauses:
            self._alarm = asyncio.get_running_loop().call_later(min(pauses) + 0.001, self.dispatch)
