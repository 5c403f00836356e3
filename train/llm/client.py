"""Asks one model, on one server or several, through the OpenAI API: patiently, many requests at a time, once each.

    with Journal(folder / "answers.sqlite") as journal:
        async with Client([Server("http://localhost:8000/v1")], "Qwen/Qwen2.5-14B-Instruct", journal) as client:
            answer = await client.ask(Request("generate", messages, Decoding(max_tokens=512, temperature=0.7)))

What goes wrong ends in one of three ways. The server's trouble (too much to do, restarting, gone) is waited for, for
as long as it takes; but one that has had too much to do from the first request on is given up after a day. One
request's trouble (too long a prompt, the same fault try after try) raises NoAnswerError, and the others go on. What a
person must mend (a key, a model's name) raises UserError, which is to end the run.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from train.errors import UserError
from train.llm.failures import LONGEST_WAIT, Trouble
from train.llm.journal import Answer, Journal, Request
from train.llm.places import Pauses, Places
from train.llm.refusals import NameSetting, config_setting
from train.llm.server import Server, ServerLane
from train.progress import SECONDS_BETWEEN_LINES, duration

FAILURES_OF_A_STAGE = 20
"""So many rows that fail before a stage's first answer are a fault of the settings, and end the run."""


FAULTS_OF_A_START = 8
"""So many responses in a row that are no answer, before any answer, are a fault of the settings too: about a minute
of them. Some servers answer an unknown model with 500, and a web page at a wrong base_url is a 200."""


class NoAnswerError(Exception):
    """This request gets no answer, whatever is done; others do. The message says what the server said.

    `advice`: the setting that the server's error is about, as a sentence.
    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


@dataclass
class Counts:
    """What became of the requests of this run."""

    answered: int = 0
    from_journal: int = 0
    failed: int = 0
    tries_failed: int = 0
    """How often a request had to be sent again."""
    cut: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens of the answers that were asked for in this run, not of those found in the journal."""
    advice: str = ""
    """The setting that the first refused request was about, as a sentence."""


class Client:
    """See the module. `attempts`: how often a request is sent, if it fails by a fault that may be its own.

    `patience`: how many seconds a server may say nothing at all, to none of its requests, before they are sent
    again; it doubles each time, so that an answer which takes longer does come. There is no limit on a single one.

    `longest_wait`: how many seconds a server may ask to be left alone (Retry-After); one that asks for more is asked
    again as if it had not said how long. One that has had too much to do for as long, and that from the first request
    on, is given up.

    `name_setting`: the command's words for a setting, for errors that are about one.

    Raises UserError for a `base_url` that is none and an environment variable that is not set.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        journal: Journal,
        *,
        attempts: int = 6,
        pauses: Pauses | None = None,
        patience: float = 3600.0,
        longest_wait: float = LONGEST_WAIT,
        name_setting: NameSetting = config_setting,
    ) -> None:
        self.model, self.journal, self.attempts = model, journal, attempts
        self.pauses = pauses or Pauses()
        self.counts = Counts()
        self._longest_wait = longest_wait
        self._lanes = [ServerLane(server, self.pauses, patience, longest_wait, name_setting) for server in servers]
        self._places = Places(self._lanes)
        self._asking: dict[bytes, asyncio.Future[None]] = {}
        self._failed_in_stage: Counter[str] = Counter()
        self._answered_stages: set[str] = set()

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._watch_silence())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
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

    def troubles(self) -> list[str]:
        """What keeps each server that has objected since its last answer, for the progress line."""
        now = time.monotonic()
        found = []
        for lane in self._lanes:
            if lane.trouble:
                again = f", next try in {duration(lane.paused_until - now)}" if lane.paused_until > now else ""
                found.append(f"{lane.name}: {lane.trouble}, for {duration(now - lane.trouble_since)}{again}")
            elif lane.in_flight and now - lane.heard_at > 60:
                found.append(f"{lane.name}: silent for {duration(now - lane.heard_at)}")
        return found

    def waits_for(self) -> set[str]:
        """The servers that keep a person waiting: those that object and have never answered, or pause for long."""
        soon = time.monotonic() + SECONDS_BETWEEN_LINES
        return {
            lane.name for lane in self._lanes if lane.trouble and not (lane.has_answered and lane.paused_until <= soon)
        }

    async def ask(self, request: Request) -> Answer:
        """The answer: from the journal, or from a server and then in the journal.

        Cancelling it leaves nothing behind. Raises NoAnswerError and UserError (see the module).
        """
        key = request.key(self.model)
        while (answer := self.journal.find(key, request.decoding.max_tokens)) is None and key in self._asking:
            await asyncio.wait([self._asking[key]])  # the same is being asked: its answer will be in the journal
        if answer is None:
            ended = self._asking[key] = asyncio.get_running_loop().create_future()
            try:
                answer = await self._ask_a_server(key, request)
            except NoAnswerError as failure:
                self.counts.failed += 1
                self.counts.advice = self.counts.advice or failure.advice
                self._count_failure(request.stage, failure)
                raise
            finally:
                del self._asking[key]
                ended.set_result(None)
            self._answered_stages.add(request.stage)
            self.counts.prompt_tokens += answer.prompt_tokens or 0
            self.counts.completion_tokens += answer.completion_tokens or 0
        self.counts.answered += 1
        self.counts.from_journal += answer.from_journal
        self.counts.cut += answer.cut
        self.counts.refused += answer.refused
        return answer

    async def _ask_a_server(self, key: bytes, request: Request) -> Answer:
        faults = tries = 0
        avoid: ServerLane | None = None
        while True:
            lane = await self._places.take(avoid)
            outcome = await self._send(lane, key, request)
            if isinstance(outcome, Answer):
                return outcome
            if outcome.kind == "hopeless":
                raise UserError(await lane.explain(self.model, outcome))
            if outcome.kind == "row":
                raise NoAnswerError(outcome.what, outcome.advice)
            if outcome.kind == "again":
                continue
            self.counts.tries_failed += 1
            tries += 1
            faults += outcome.kind == "fault"
            self._end_a_false_start(request.stage, lane, outcome)
            if faults >= self.attempts:
                raise NoAnswerError(f"{outcome.what} ({self.attempts} times)", outcome.advice)
            avoid = lane
            if outcome.retry_after is None:
                await asyncio.sleep(self.pauses.after(tries))

    async def _send(self, lane: ServerLane, key: bytes, request: Request) -> Answer | Trouble:
        """Ask once, in a place that was taken on this lane; it is given back, and the lane told how it went."""
        sent_at = time.monotonic()
        outcome: Answer | Trouble | None = None
        try:
            outcome = await lane.send(self.model, request)
        finally:
            self._places.unwritten += isinstance(outcome, Answer)
            self._places.give_back(lane)
            lane.learn(outcome, sent_at)
            self._places.hand_out()
        if isinstance(outcome, Answer):
            try:
                await self.journal.add(key, self.model, request, outcome)
            finally:
                self._places.unwritten -= 1
                self._places.hand_out()
        return outcome

    def _end_a_false_start(self, stage: str, lane: ServerLane, trouble: Trouble) -> None:
        if any(one.has_answered for one in self._lanes):
            return
        waited = time.monotonic() - lane.trouble_since
        is_response = trouble.kind == "fault" and trouble.status is not None
        if is_response and lane.failures_in_a_row >= FAULTS_OF_A_START:
            since = f"{lane.failures_in_a_row} times in a row"
            advice = trouble.advice or f"Is base_url right, and is {self.model!r} a model that it serves?"
        elif trouble.kind == "too much" and waited > self._longest_wait:
            since = f"for {duration(waited)}"
            advice = "Start the same command when it takes requests again, or name another server."
        else:
            return
        if not self.journal.has_stage(stage, self.model):
            raise UserError(
                f"{lane.name} has answered nothing so far; {since} it said: {trouble.what.rstrip('.')}. {advice}"
            )

    def _count_failure(self, stage: str, failure: NoAnswerError) -> None:
        if stage in self._answered_stages:
            return
        self._failed_in_stage[stage] += 1
        if self._failed_in_stage[stage] >= FAILURES_OF_A_STAGE:
            if self.journal.has_stage(stage, self.model):  # in an earlier run: what is left are the rows that fail
                self._answered_stages.add(stage)
                return
            raise UserError(
                f"stage {stage}: none of the first {FAILURES_OF_A_STAGE} requests got an answer from {self.model}. "
                f"The last one: {str(failure).rstrip('.')}. "
                f"{failure.advice or 'Mend the settings of the stage or of the server.'}"
            ) from failure

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(min(lane.patience for lane in self._lanes) / 8)
            for lane in self._lanes:
                lane.interrupt_if_silent()
