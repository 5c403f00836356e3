"""Rules by which trouble with servers ends a request or the run, or closes one of several servers.

The run ends where the user has to change something, and no server is left that could go on:

- A start at which a server can't be reached, closes every connection or sends nothing ends after --wait-for-server; one
  of several is named in a warning.
- A start at which a server answers nothing but errors ends after `FAULTS_OF_A_START` of them.
- A refused key or used up credit closes one of several servers with a warning, and ends the run at the last of them.
"""

import asyncio
import sys
import time
from collections.abc import Collection, Sequence

from train.errors import UserError
from train.formatting import duration
from train.llm.connection.diagnosis import explain, look
from train.llm.connection.errors import speaks_tls, tls_wanted
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.server import SILENT, ServerConnection
from train.llm.server_errors import ServerError
from train.llm.startup_check import unreachable

FAULTS_OF_A_START = 8
"""Responses in a row without an answer, before any answer, that end the run: the settings are wrong. They take about
a minute. Some servers answer an unknown model with 500, and a web page at a wrong base_url is a 200."""

DENIALS = 8
"""A server that has answered before and then refuses the key this many times in a row, which takes about half a minute,
refuses it for good."""

FEW_DENIED = 2
"""Up to this many requests that are denied (403) in the same way are denied for their content."""

LONGEST_ABSENCE = 600.0
"""Seconds for which 404s of a server that has answered before are waited for: a gateway sends them while the pod behind
it is replaced, which includes loading the model. So long, too, one of several servers may load it for its first answer
until its requests are sent to the others."""

SILENCE_OF_A_START = 30.0
"""Seconds without a byte from a server that has never sent one, after which it is asked for its list of models."""

LONGEST_PAUSE_OF_LOOKS = 10.0
"""Seconds between looks at servers that have closed connections without an answer: they may be back any time."""


class FailurePolicy:
    """See the module. The settings are those of `Client`."""

    def __init__(
        self,
        lanes: Sequence[ServerConnection],
        model: str,
        journal: Journal,
        *,
        longest_wait: float,
        longest_absence: float,
        wait_for_server: float,
    ) -> None:
        self._lanes, self._model, self._journal = lanes, model, journal
        self._longest_wait, self._longest_absence = longest_wait, longest_absence
        self._wait_for_server = wait_for_server
        self.silence = SILENCE_OF_A_START
        self._warned_of: set[str] = set()

    async def close_or_raise(self, lane: ServerConnection, trouble: ServerError) -> None:
        """Close a server that will answer no request for now, or raise UserError where no other can go on.

        One of several is closed for its key or its credit alone: an address, a model's name or a certificate is wrong
        from the start, and corrected at once.
        """
        if lane.closed:
            return
        others = [one for one in self._lanes if one is not lane and not (one.closed or one.rests)]
        if trouble.status not in (401, 402, 403) or len(self._lanes) == 1:
            raise UserError(await explain(lane, self._model, trouble))
        if not others:
            words = await explain(lane, self._model, trouble)
            raise UserError(f"{words} The other servers were closed before: {self._named_closed()}.")
        lane.closed = trouble.what.rstrip(".")
        words = await explain(lane, self._model, trouble, others_go_on=True)
        self._warn(f"{words} It is asked nothing more, and the run goes on with the other servers.")

    def _named_closed(self) -> str:
        return "; ".join(f"{lane.name} ({lane.closed})" for lane in self._lanes if lane.closed)

    async def end_if_denied(
        self, stage: str, lane: ServerConnection, trouble: ServerError, denied_at: float | None
    ) -> None:
        """Raise where it is known who has to act on a refusal: UserError for the run, RequestFailed for this request.

        `denied_at`: when this request was denied before.
        """
        # An earlier run may have left only the requests that are denied for what they say.
        if not lane.has_answered and not (trouble.status == 403 and self._journal.has_stage(stage, self._model)):
            return await self.close_or_raise(lane, trouble)
        if trouble.status in (401, 403, 407):
            is_over = lane.denials >= DENIALS
        else:
            is_over = time.monotonic() - lane.denied_since > self._longest_absence
        if trouble.status == 403:
            others_answered = denied_at is not None and lane.answered_sent_at > denied_at
            if others_answered or (is_over and len(lane.denied) <= FEW_DENIED):
                raise RequestFailed(trouble.what)
        if is_over:
            await self.close_or_raise(lane, trouble)

    async def end_a_wrong_start(self, stage: str, lane: ServerConnection, trouble: ServerError) -> None:
        """Raise UserError where no server has answered, and this one won't."""
        self._end_a_false_start(stage, lane, trouble)
        await self._end_an_unreachable_start(lane, trouble)

    def _end_a_false_start(self, stage: str, lane: ServerConnection, trouble: ServerError) -> None:
        if any(one.has_answered for one in self._lanes):
            return
        waited = time.monotonic() - lane.trouble_since
        if trouble.kind == "fault" and lane.failures_in_a_row >= FAULTS_OF_A_START:
            since = f"{lane.failures_in_a_row} times in a row"
            is_error = trouble.status not in (200, None)  # a 200 may be any web page
            advice = f"Is {'' if is_error else 'base_url right, and is '}{self._model!r} a model that it serves?"
            advice = trouble.advice or advice
        elif trouble.kind == "too much" and waited > self._longest_wait:
            since = f"for {duration(waited)}"
            advice = "Start the same command when it takes requests again, or name another server."
        else:
            return
        if not self._journal.has_stage(stage, self._model):
            raise UserError(
                f"{lane.name} has answered nothing so far; {since} it said: {trouble.what.rstrip('.')}. {advice}"
            )

    async def _end_an_unreachable_start(self, lane: ServerConnection, trouble: ServerError) -> None:
        if trouble.kind not in ("gone", "dropped") or lane.reached or lane.away_since is None:
            return
        waited = time.monotonic() - lane.away_since
        if waited < self._wait_for_server:
            return
        if trouble.kind == "dropped":
            if lane.failures_in_a_row < 2:  # a single one may be the request's
                return
            if await speaks_tls(lane.address):
                raise UserError(await explain(lane, self._model, tls_wanted(lane.address)))
            if await self._is_there(lane):
                return
        words = unreachable(lane, trouble, waited)
        usable = [one for one in self._lanes if not one.closed]
        if not any(one.reached or one.trouble is None for one in usable):
            raise UserError(words)
        if lane.name not in self._warned_of:
            self._warned_of.add(lane.name)
            self._warn(f"{words} The run goes on with the other servers.")

    def _warn(self, words: str) -> None:
        print(f"warning: {words}", file=sys.stderr, flush=True)

    async def _is_there(self, lane: ServerConnection) -> bool:
        """Return whether a server answers a look at its models; a gateway may say that it has no server."""
        return await look(lane) not in (None, 502, 503, 504)

    async def wait_until_one_is_there(self) -> Collection[ServerConnection]:
        """Return the servers that answer a look at their models, as soon as there are any."""
        looks = 0
        while True:
            usable = [lane for lane in self._lanes if not lane.closed]
            found = await asyncio.gather(*(self._is_there(lane) for lane in usable))
            if any(found):
                return [lane for lane, is_there in zip(usable, found, strict=True) if is_there]
            looks += 1
            await asyncio.sleep(min(usable[0].backoff.after(looks), LONGEST_PAUSE_OF_LOOKS))

    async def watch_silent_starts(self) -> None:
        """Look at servers that have been asked and never sent a byte: warn, and free the requests if others answer."""
        now = time.monotonic()
        silent = [
            lane
            for lane in self._lanes
            if lane.rests or (lane.in_flight and not lane.has_answered and now - lane.heard_at > self.silence)
        ]
        await asyncio.gather(*(self._look_at_silent(lane, now) for lane in silent))

    async def _look_at_silent(self, lane: ServerConnection, now: float) -> None:
        others_answer = any(one.has_answered and not one.closed for one in self._lanes)
        if lane.reached:  # it may be loading the model
            if others_answer and now - lane.heard_at > self._longest_absence:
                lane.interrupt()
            return
        is_heard = await look(lane) is not None
        lane.rests = others_answer and not is_heard
        if is_heard:
            return
        if lane.rests:
            lane.interrupt()
        if lane.name not in self._warned_of:
            self._warned_of.add(lane.name)
            goes_on = "Its requests are sent to the other servers." if others_answer else "The run goes on waiting."
            self._warn(f"{unreachable(lane, SILENT)} {goes_on}")

    def bad_servers(self) -> list[str]:
        """Return what is wrong with each server that was closed, or never answered while others did."""
        found = []
        any_answered = any(lane.has_answered for lane in self._lanes)
        for lane in self._lanes:
            if lane.closed:
                found.append(f"{lane.name} was asked nothing more, as it answered: {lane.closed}.")
            elif lane.was_asked and any_answered and not lane.has_answered:
                why = (lane.trouble or "nothing came from it").rstrip(".")
                found.append(f"{lane.name} never gave an answer ({why}). The other servers did all the work.")
        return found
