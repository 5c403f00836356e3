"""Failure policy: when server errors end a request or the run, or close one of several servers.

The run ends if the user has to change something and no other server can continue:

- A start at which a server can't be reached, closes every connection or sends nothing ends after --wait-for-server; one
  of several is named in a warning.
- A start at which a server answers only errors ends after `ERRORS_AT_START` of them.
- A refused key or used up credit closes one of several servers with a warning, and ends the run at the last of them.
"""

import asyncio
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from train.errors import UserError
from train.formatting import duration
from train.llm.connection.errors import speaks_tls, tls_expected
from train.llm.diagnosis import describe_unreachable, explain
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.server import SILENT, ServerConnection
from train.llm.server_errors import ServerError

ERRORS_AT_START = 8
"""Errors in a row, before any answer, that end the run: the settings are wrong. They take about a minute. Some servers
answer an unknown model with 500, and a web page at a wrong base_url is a 200."""

DENIALS = 8
"""Denials in a row, about half a minute, after which a server that has answered before refuses the key for good."""

FEW_DENIED = 2
"""Up to this many requests that are denied (403) in the same way are denied for their content."""

LONGEST_ABSENCE = 600.0
"""Seconds for which 404s of a server that has answered before are retried: a gateway sends them while the pod behind it
is replaced, which includes loading the model. Also the time that one of several servers has to load it for its first
answer, before its requests are sent to the others."""

SILENCE_AT_START = 30.0
"""Seconds without a byte from a server that has never sent one, after which it is probed."""

LONGEST_PROBE_PAUSE = 10.0
"""Seconds between probes of servers that closed connections without an answer: they may be back at any time."""

FAILURES_OF_STAGE = 20
"""Failed requests of a stage, before any answer, after which the stage is judged: when the requests in flight have
failed too, the settings are wrong, and the run ends. Requests that are too long or filtered don't count: a server
refuses them at once, and answers others later."""


@dataclass
class _StageStart:
    """State of a stage without an answer. `pending`: requests to await before it is judged; None = not yet."""

    failed: int = 0
    about_content: int = 0
    in_flight: set[bytes] = field(default_factory=set)
    pending: set[bytes] | None = None


class FailurePolicy:
    """The policy for the servers of one client; its settings are those of `Client`."""

    def __init__(
        self,
        servers: Sequence[ServerConnection],
        model: str,
        journal: Journal,
        *,
        longest_wait: float,
        longest_absence: float,
        wait_for_server: float,
    ) -> None:
        self._servers, self._model, self._journal = servers, model, journal
        self._longest_wait, self._longest_absence = longest_wait, longest_absence
        self._wait_for_server = wait_for_server
        self.silence = SILENCE_AT_START
        self._warned: set[str] = set()
        self._starts: dict[str, _StageStart] = {}
        self._answered_stages: set[str] = set()

    async def close_or_raise(self, server: ServerConnection, error: ServerError) -> None:
        """Close a server that will answer no request for now, or raise UserError if no other server can continue.

        One of several is closed only for its key or its credit: an address, a model's name or a certificate is wrong
        from the start, and corrected at once.
        """
        if server.closed:
            return
        usable = [other for other in self._servers if other is not server and not (other.closed or other.suspended)]
        if error.status not in (401, 402, 403) or len(self._servers) == 1:
            raise UserError(await explain(server, self._model, error))
        if not usable:
            closed = "; ".join(f"{other.name} ({other.closed})" for other in self._servers if other.closed)
            cause = await explain(server, self._model, error)
            raise UserError(f"{cause} The other servers were closed before: {closed}.")
        server.closed = error.message.rstrip(".")
        cause = await explain(server, self._model, error, run_continues=True)
        _warn(f"{cause} It gets no more requests, and the run continues with the other servers.")

    async def raise_if_denied(
        self, stage: str, server: ServerConnection, error: ServerError, denied_at: float | None
    ) -> None:
        """Raise UserError if a denial is final for the server, RequestFailed if it is for this request.

        `denied_at`: time of this request's first denial.
        """
        # An earlier run may have left only the requests that are denied for their content.
        if not server.has_answered and not (error.status == 403 and self._journal.has_stage(stage, self._model)):
            return await self.close_or_raise(server, error)
        if error.status in (401, 403, 407):
            is_final = server.denials >= DENIALS
        else:
            is_final = time.monotonic() - server.denied_since > self._longest_absence
        if error.status == 403:
            others_answered = denied_at is not None and server.answered_sent_at > denied_at
            if others_answered or (is_final and len(server.denied) <= FEW_DENIED):
                raise RequestFailed(error.message)
        if is_final:
            await self.close_or_raise(server, error)

    async def raise_at_start(self, stage: str, server: ServerConnection, error: ServerError) -> None:
        """Raise UserError if no server has answered yet, and this one won't."""
        self._raise_if_only_errors(stage, server, error)
        await self._raise_if_unreachable(server, error)

    def _raise_if_only_errors(self, stage: str, server: ServerConnection, error: ServerError) -> None:
        if any(other.has_answered for other in self._servers):
            return
        waited = time.monotonic() - server.failing_since
        if error.kind == "retryable" and server.failures_in_a_row >= ERRORS_AT_START:
            since = f"{server.failures_in_a_row} times in a row"
            is_error = error.status not in (200, None)  # a 200 may be any web page
            question = f"Is {'' if is_error else 'base_url right, and is '}{self._model!r} a model that it serves?"
            advice = error.advice or question
        elif error.kind == "rate_limited" and waited > self._longest_wait:
            since = f"for {duration(waited)}"
            advice = "Start the same command when it takes requests again, or name another server."
        else:
            return
        if not self._journal.has_stage(stage, self._model):
            raise UserError(f"{server.name} has not answered; {since} it said: {error.message.rstrip('.')}. {advice}")

    async def _raise_if_unreachable(self, server: ServerConnection, error: ServerError) -> None:
        if error.kind not in ("unreachable", "dropped") or server.endpoint.reached or server.away_since is None:
            return
        waited = time.monotonic() - server.away_since
        if waited < self._wait_for_server:
            return
        if error.kind == "dropped":
            if server.failures_in_a_row < 2:  # a single one may be due to the request
                return
            if await speaks_tls(server.endpoint.address):
                raise UserError(await explain(server, self._model, tls_expected(server.endpoint.address)))
            if await _is_up(server):
                return
        message = describe_unreachable(server, error, waited)
        usable = [other for other in self._servers if not other.closed]
        if not any(other.endpoint.reached or other.last_error is None for other in usable):
            raise UserError(message)
        self._warn_once(server, f"{message} The run continues with the other servers.")

    async def wait_until_up(self) -> Collection[ServerConnection]:
        """Wait until any server answers a probe; return those that do."""
        probes = 0
        while True:
            usable = [server for server in self._servers if not server.closed]
            results = await asyncio.gather(*map(_is_up, usable))
            if any(results):
                return [server for server, is_up in zip(usable, results, strict=True) if is_up]
            probes += 1
            await asyncio.sleep(min(usable[0].backoff.delay(probes), LONGEST_PROBE_PAUSE))

    async def check_silent_servers(self) -> None:
        """Probe servers that were asked and never sent a byte: warn, and move their requests if others answer."""
        now = time.monotonic()
        silent = [
            server
            for server in self._servers
            if server.suspended
            or (server.in_flight and not server.has_answered and now - server.heard_at > self.silence)
        ]
        await asyncio.gather(*(self._check_silent(server, now) for server in silent))

    async def _check_silent(self, server: ServerConnection, now: float) -> None:
        others_answer = any(other.has_answered and not other.closed for other in self._servers)
        if server.endpoint.reached:  # it may be loading the model
            if others_answer and now - server.heard_at > self._longest_absence:
                server.interrupt()
            return
        has_response = await server.endpoint.probe() is not None
        server.suspended = others_answer and not has_response
        if has_response:
            return
        if server.suspended:
            server.interrupt()
        effect = "Its requests are sent to the other servers." if others_answer else "The run continues to wait."
        self._warn_once(server, f"{describe_unreachable(server, SILENT)} {effect}")

    def begin_request(self, stage: str, key: bytes) -> None:
        """Note a request in flight, if its stage has no answer yet."""
        if stage not in self._answered_stages:
            self._starts.setdefault(stage, _StageStart()).in_flight.add(key)

    def end_request(self, stage: str, key: bytes) -> None:
        """Note the end of a request."""
        if start := self._starts.get(stage):
            start.in_flight.discard(key)
            if start.pending is not None:
                start.pending.discard(key)

    def mark_answered(self, stage: str) -> None:
        """Note that a stage has an answer: the failures of its requests no longer end the run."""
        self._answered_stages.add(stage)
        self._starts.pop(stage, None)

    def count_failure(self, stage: str, failure: RequestFailed) -> None:
        """Raise UserError if all requests of a stage have failed (see `FAILURES_OF_STAGE`)."""
        if (start := self._starts.get(stage)) is None:
            return
        start.about_content += failure.about_content
        start.failed += not failure.about_content
        if start.failed < FAILURES_OF_STAGE:
            return
        if start.pending is None:
            if self._journal.has_stage(stage, self._model):  # answered in an earlier run: only failing requests remain
                return self.mark_answered(stage)
            start.pending = set(start.in_flight)
        if not start.pending:
            raise UserError(
                f"stage {stage}: none of the first {start.failed + start.about_content:,} requests got an answer from "
                f"{self._model}. The last error: {str(failure).rstrip('.')}. "
                f"{failure.advice or 'Change the settings of the stage or of the server.'}"
            ) from failure

    def stage_messages(self) -> list[str]:
        """Return a line for each stage without an answer whose requests are too long or filtered."""
        return [
            f"stage {stage}: no answer so far, {start.about_content:,} refused as too long or by a filter"
            for stage, start in self._starts.items()
            if start.about_content >= FAILURES_OF_STAGE
        ]

    def bad_servers(self) -> list[str]:
        """Return the error of each server that was closed, or never answered while others did."""
        lines = []
        any_answered = any(server.has_answered for server in self._servers)
        for server in self._servers:
            if server.closed:
                lines.append(f"{server.name} got no more requests after its answer: {server.closed}.")
            elif server.was_asked and any_answered and not server.has_answered:
                error = (server.last_error or "nothing came from it").rstrip(".")
                lines.append(f"{server.name} never gave an answer ({error}). The other servers did all the work.")
        return lines

    def _warn_once(self, server: ServerConnection, message: str) -> None:
        if server.name not in self._warned:
            self._warned.add(server.name)
            _warn(message)


async def _is_up(server: ServerConnection) -> bool:
    """Return True if a server answers a probe; a gateway may answer that it has no server."""
    return await server.endpoint.probe() not in (None, 502, 503, 504)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
