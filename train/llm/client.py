"""Asks one model, on one server or several, through the OpenAI API: patiently, many requests at a time, once each.

    with Journal(folder / "answers.sqlite") as journal:
        async with Client([Server("http://localhost:8000/v1")], "Qwen/Qwen2.5-14B-Instruct", journal) as client:
            answer = await client.ask(Request("generate", messages, Decoding(max_tokens=512, temperature=0.7)))

Errors end in one of three ways:

- The server's own (too much to do, restarting, gone) are waited for, for as long as it takes; but a server that has had
  too much to do from the first request on is given up after a day. A connection that ends without a response is the
  server's own where it answers nobody, and else the request's.
- A request's own (too long a prompt, the same fault try after try) raise RequestFailed, and the others go on.
- What the user has to change (a key, a model's name, credit) raises UserError, which ends the run. A server that has
  answered before is asked again first: a 401 or 403 ends the run when nothing else has come for `DENIALS` tries, a 404
  when nothing else has come for `LONGEST_ABSENCE` (see endings.py). Requests that were not answered by then are asked
  by the next run. A key or credit ends the run only where no other server is left.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from train.errors import UserError
from train.formatting import duration
from train.llm.concurrency import Backoff, ConcurrencyLimiter
from train.llm.empty_answers import has_nonempty_answer, is_empty_answer
from train.llm.failure_policy import LONGEST_ABSENCE, FailurePolicy
from train.llm.failures import EmptyAnswerError, RequestFailed
from train.llm.journal import Answer, Journal, Request
from train.llm.options import WAIT_FOR_SERVER
from train.llm.refusals import SettingFormatter, format_config_key
from train.llm.replies import describe_empty
from train.llm.server import PAUSE_OF_A_START, Server, ServerConnection
from train.llm.server_errors import LONGEST_WAIT, ServerError
from train.llm.startup_check import share_secrets
from train.progress import SECONDS_BETWEEN_LINES

FAILURES_OF_A_STAGE = 20
"""After this many requests of a stage that failed for good, before any was answered, the stage is judged: when those
that are still in flight have failed too, the settings are wrong, and the run ends. Requests that are too long, or
that a filter refuses, don't count: a server refuses them at once, and answers others later."""


@dataclass
class _Start:
    """A stage without an answer so far. `awaited`: those in flight when it came to be judged; None: it is not yet."""

    failed: int = 0
    about_content: int = 0
    in_flight: set[bytes] = field(default_factory=set)
    awaited: set[bytes] | None = None

    def end(self, key: bytes) -> None:
        """Note that a request has ended."""
        self.in_flight.discard(key)
        if self.awaited is not None:
            self.awaited.discard(key)


@dataclass
class Counts:
    """Counts of the requests of this run."""

    answered: int = 0
    from_journal: int = 0
    failed: int = 0
    retries: int = 0
    """How often a request had to be sent again."""
    cut: int = 0
    refused: int = 0
    reasoned: int = 0
    """Answers of this run that came with reasoning in a field of its own."""
    with_ignored_parts: int = 0
    """Answers of this run with parts beside the text that can't be read as text (Mistral's references)."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens of the answers that were asked for in this run, not of those found in the journal."""
    advice: str = ""
    """The setting that the first refused request was about, as a sentence."""
    bad_servers: list[str] = field(default_factory=list)
    """The fault of each server that was closed, or never answered while others did; known at the end."""


class Client:
    """See the module. `attempts`: how often a request is sent, if it fails by a fault that may be its own.

    `patience`: how many seconds a server may say nothing at all, to none of its requests, before they are sent
    again; it doubles each time, so that an answer which takes longer does come. There is no limit on a single one.

    `wait_for_server`: how many seconds a server that can't be reached is waited for at the start. If by then none has
    been reached, the run ends; one of several is named in a warning, and still tried now and then. Later in the run
    there is no limit: a server that has been reached comes back.

    `longest_wait`: how many seconds a server may ask to be left alone (Retry-After); one that asks for more is asked
    again as if it had not said how long. One that has had too much to do for as long, and that from the first request
    on, is given up.

    `accept_empty`: an empty answer is asked for once more and then taken as what the model says; evaluations want that,
    as a model may say nothing. Otherwise it is asked for `attempts` times and raises EmptyAnswerError; the last one is
    kept, see `ask`. One whose text went into a field of reasoning is never taken: the server was started wrongly.

    `longest_absence`: see `LONGEST_ABSENCE`. `format_setting`: the command's words for a setting, for errors about one.

    Raises UserError for a `base_url` that is none and an environment variable that is not set.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        journal: Journal,
        *,
        attempts: int = 6,
        backoff: Backoff | None = None,
        patience: float = 3600.0,
        longest_wait: float = LONGEST_WAIT,
        accept_empty: bool = False,
        longest_absence: float = LONGEST_ABSENCE,
        wait_for_server: float = WAIT_FOR_SERVER,
        format_setting: SettingFormatter = format_config_key,
    ) -> None:
        self.model, self.journal, self.attempts = model, journal, attempts
        self.backoff = backoff or Backoff()
        self.counts = Counts()
        self._wait_for_server, self._accept_empty = wait_for_server, accept_empty
        self._lanes = [
            ServerConnection(server, self.backoff, patience, longest_wait, format_setting) for server in servers
        ]
        share_secrets(self._lanes)
        has_finish_reasons = journal.has_finish_reasons(model, len(self._lanes))
        for lane in self._lanes:
            lane.gives_finish_reasons = has_finish_reasons
        self._policy = FailurePolicy(
            self._lanes,
            model,
            journal,
            longest_wait=longest_wait,
            longest_absence=longest_absence,
            wait_for_server=wait_for_server,
        )
        self._places = ConcurrencyLimiter(self._lanes)
        self._asking: dict[bytes, asyncio.Future[None]] = {}
        self._starts: defaultdict[str, _Start] = defaultdict(_Start)
        self._answered_stages: set[str] = set()

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._watch_silence())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.counts.bad_servers = self._policy.bad_servers()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        for lane in self._lanes:
            await lane.api.close()

    @property
    def concurrency(self) -> int:
        """How many requests are in flight at most."""
        return sum(lane.most for lane in self._lanes)

    @property
    def in_flight(self) -> int:
        """How many requests are with the servers now."""
        return sum(lane.in_flight for lane in self._lanes)

    def server_messages(self) -> list[str]:
        """What keeps each server that has objected since its last answer, for the progress line."""
        now = time.monotonic()
        found = []
        for lane in self._lanes:
            again = f", next try in {duration(lane.paused_until - now)}" if lane.paused_until > now else ""
            if lane.closed:
                found.append(f"{lane.name}: {lane.closed}; it is asked nothing more")
            elif lane.trouble:
                passed = now - lane.trouble_since
                is_bounded = lane.is_away and not lane.reached and passed < self._wait_for_server
                at_most = f" of {duration(self._wait_for_server)} at most"
                since = f"for {duration(passed)}{at_most if is_bounded and len(self._lanes) == 1 else ''}"
                found.append(f"{lane.name}: {lane.trouble}, {since}{again}")
            elif again:
                found.append(f"{lane.name}: {lane.pause_reason}{again}")
            elif lane.in_flight and now - lane.heard_at > 60:
                found.append(f"{lane.name}: silent for {duration(now - lane.heard_at)}")
        for stage, start in self._starts.items():
            if start.about_content >= FAILURES_OF_A_STAGE and stage not in self._answered_stages:
                found.append(
                    f"stage {stage}: no answer so far, {start.about_content:,} refused as too long or by a filter"
                )
        return found

    def blocking_servers(self) -> set[str]:
        """The servers that keep a person waiting: those that object and have never answered, or pause for long."""
        soon = time.monotonic() + SECONDS_BETWEEN_LINES
        return {
            lane.name
            for lane in self._lanes
            if lane.closed or (lane.trouble and not lane.has_answered) or lane.paused_until > soon
        }

    async def ask(
        self, request: Request, *, next_try: Request | None = None, continues_if_empty: bool = False
    ) -> Answer:
        """Return the answer: from the journal, or from a server and then in the journal.

        An empty answer in the journal is asked for again, unless an earlier start went on without one: another answer
        would change what that start wrote. Cancelling leaves nothing behind.

        Args:
            request: what to ask.
            next_try: what the caller asks next where this answer is empty; None = the same with the next sample.
                An earlier start went on if the journal holds its answer.
            goes_on_empty: the caller asks for nothing in the place of an empty answer, and loses no row by it.

        Raises:
            EmptyAnswerError, RequestFailed, UserError: see the module.
        """
        key = request.key(self.model)
        while (answer := self._recorded(request, key, next_try, continues_if_empty)) is None and key in self._asking:
            await asyncio.wait([self._asking[key]])  # the same is being asked: its answer will be in the journal
        if answer is None:
            ended = self._asking[key] = asyncio.get_running_loop().create_future()
            start = None if request.stage in self._answered_stages else self._starts[request.stage]
            if start:
                start.in_flight.add(key)
            try:
                answer = await self._ask_a_server(key, request)
            except RequestFailed as failure:
                self.counts.failed += 1
                self.counts.advice = self.counts.advice or failure.advice
                if start:
                    start.end(key)
                    self._count_failure(request.stage, start, failure)
                raise
            finally:
                if start:
                    start.end(key)
                del self._asking[key]
                ended.set_result(None)
            self._answered_stages.add(request.stage)
            self.counts.prompt_tokens += answer.prompt_tokens or 0
            self.counts.completion_tokens += answer.completion_tokens or 0
            self.counts.reasoned += bool(answer.reasoning_in)
            self.counts.with_ignored_parts += bool(answer.ignored_part)
        self.counts.answered += 1
        self.counts.from_journal += answer.from_journal
        self.counts.cut += answer.cut
        self.counts.refused += answer.refused
        return answer

    def _recorded(
        self, request: Request, key: bytes, next_try: Request | None, continues_if_empty: bool
    ) -> Answer | None:
        """Return the answer in the journal. Raises EmptyAnswerError for an empty one that is not to be asked again."""
        answer = self.journal.find(key, request.decoding.max_tokens, accept_empty=True)
        if answer is None or self._accept_empty or not is_empty_answer(answer):
            return answer
        next_try = next_try or replace(request, sample=request.sample + 1)
        if not (continues_if_empty or has_nonempty_answer(self.journal, self.model, next_try)):
            return None
        self.counts.answered += 1
        self.counts.from_journal += 1
        raise EmptyAnswerError(describe_empty(answer), answer)

    async def _ask_a_server(self, key: bytes, request: Request) -> Answer:
        faults = empty = tries = 0
        avoid: ServerConnection | None = None
        denied_at: float | None = None
        seen: Collection[ServerConnection] = ()
        """The servers that were there before the last try."""
        while True:
            lane = await self._places.take(avoid)
            outcome = await self._send(lane, key, request, accept_empty=self._accept_empty and empty > 0)
            if isinstance(outcome, Answer):
                return outcome
            if isinstance(outcome, EmptyAnswerError):
                self.counts.retries += 1
                empty += 1
                if empty >= self.attempts:
                    if not self._accept_empty:  # else it would be taken for what the model says
                        await self.journal.add(key, self.model, request, outcome.answer)
                    raise EmptyAnswerError(f"{outcome} ({self.attempts} times)", outcome.answer)
                avoid = lane
                await asyncio.sleep(self.backoff.after(empty))
                continue
            if outcome.kind == "hopeless":
                await self._policy.close_or_raise(lane, outcome)
            if outcome.kind == "row":
                raise RequestFailed(outcome.what, outcome.advice, about_content=outcome.about_content)
            if outcome.kind == "denied":
                lane.denied.add(key)
                await self._policy.end_if_denied(request.stage, lane, outcome, denied_at)
                denied_at = denied_at or time.monotonic()
            if outcome.kind == "again":
                continue
            self.counts.retries += 1
            tries += 1
            faults += outcome.kind in ("fault", "broken") or (outcome.kind == "dropped" and lane.reached)
            await self._policy.end_a_wrong_start(request.stage, lane, outcome)
            if outcome.kind == "dropped" and faults >= self.attempts - 1:
                if lane in seen and faults >= self.attempts:
                    raise RequestFailed(f"{outcome.what} ({self.attempts} times)")
                # Before it counts for the last time, the server has to be there: the request may not be the reason.
                faults = self.attempts - 1
                seen = await self._policy.wait_until_one_is_there()
            if faults >= self.attempts:
                raise RequestFailed(f"{outcome.what} ({self.attempts} times)", outcome.advice)
            avoid = lane
            if outcome.retry_after is None and outcome.kind != "too much":  # of which the whole server rests
                pause = self.backoff.after(tries)
                await asyncio.sleep(pause if lane.reached else min(pause, PAUSE_OF_A_START))

    async def _send(
        self, lane: ServerConnection, key: bytes, request: Request, *, accept_empty: bool
    ) -> Answer | ServerError | EmptyAnswerError:
        """Ask once, in a place that was taken on this lane; it is given back, and the lane told how it went.

        An answer is in the journal when this returns.
        """
        sent_at = time.monotonic()
        outcome: Answer | ServerError | None = None
        is_kept = False
        try:
            outcome = await lane.send(self.model, request)
            if isinstance(outcome, Answer):
                is_kept = not is_empty_answer(outcome) or (accept_empty and not outcome.reasoning_in)
        finally:
            self._places.uncommitted += is_kept
            self._places.release(lane)
            lane.learn(outcome, sent_at)
            self._places.dispatch()
        if isinstance(outcome, Answer):
            if not is_kept:
                return EmptyAnswerError(describe_empty(outcome), outcome)
            try:
                await self.journal.add(key, self.model, request, outcome)
            finally:
                self._places.uncommitted -= 1
                self._places.dispatch()
        return outcome

    def _count_failure(self, stage: str, start: _Start, failure: RequestFailed) -> None:
        """Raise UserError where a stage has failed as a whole (see `FAILURES_OF_A_STAGE`)."""
        if stage in self._answered_stages:
            return
        start.about_content += failure.about_content
        start.failed += not failure.about_content
        if start.failed < FAILURES_OF_A_STAGE:
            return
        if start.awaited is None:
            if self.journal.has_stage(stage, self.model):  # in an earlier run: what is left are the rows that fail
                self._answered_stages.add(stage)
                return
            start.awaited = set(start.in_flight)
        if not start.awaited:
            raise UserError(
                f"stage {stage}: none of the first {start.failed + start.about_content:,} requests got an answer from "
                f"{self.model}. The last one: {str(failure).rstrip('.')}. "
                f"{failure.advice or 'Change the settings of the stage or of the server.'}"
            ) from failure

    async def _watch_silence(self) -> None:
        while True:
            patience = min(lane.patience for lane in self._lanes)
            await asyncio.sleep(min(patience, self._policy.silence) / 8)
            await self._policy.watch_silent_starts()
            self._places.dispatch()
            for lane in self._lanes:
                lane.interrupt_if_silent()
