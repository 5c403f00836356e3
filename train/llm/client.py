"""Client of one model, on one server or several, over the OpenAI API: many requests at a time, each asked once.

    with Journal(folder / "answers.sqlite") as journal:
        async with Client([Server("http://localhost:8000/v1")], "Qwen/Qwen2.5-14B-Instruct", journal) as client:
            answer = await client.ask(Request("generate", messages, Decoding(max_tokens=512, temperature=0.7)))

An error is one of three kinds:

- Of the server (overloaded, restarting, unreachable): the client waits without a limit. A server that is rate limited
  from the first request on is given up after a day. A connection that ends without a response counts as the server's
  error if it answers nobody, and else as the request's.
- Of the request (prompt too long, the same error try after try): it raises RequestFailed, and the others continue.
- Of the settings (key, model name, credit): it raises UserError, which ends the run. A server that has answered before
  is asked again first: a 401 or 403 ends the run after `DENIALS` in a row, a 404 after `LONGEST_ABSENCE` (see
  failure_policy.py). The next run asks the requests without an answer. A key or credit ends the run only if no other
  server is left.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from train.formatting import duration
from train.llm.concurrency import Backoff, ConcurrencyLimiter
from train.llm.empty_answers import has_nonempty_answer, is_empty_answer
from train.llm.failure_policy import LONGEST_ABSENCE, FailurePolicy
from train.llm.failures import EmptyAnswerError, RequestFailed
from train.llm.journal import Journal
from train.llm.options import WAIT_FOR_SERVER
from train.llm.refusals import SettingFormatter, format_config_key
from train.llm.replies import describe_empty
from train.llm.request import Answer, Request
from train.llm.server import LONGEST_START_PAUSE, Server, ServerConnection, share_secrets
from train.llm.server_errors import LONGEST_WAIT, ServerError
from train.progress import SECONDS_BETWEEN_LINES


@dataclass
class Counts:
    """Counts of this run's requests.

    retries: tries beyond the first.
    reasoned: answers of this run with reasoning in a field of its own.
    with_ignored_parts: answers of this run with parts beside the text that can't be read (Mistral's references).
    prompt_tokens, completion_tokens: of the answers asked for in this run, without those from the journal.
    advice: the setting that the first refused request was about, as a sentence.
    bad_servers: the error of each server that was closed, or never answered while others did; known at the end.
    """

    answered: int = 0
    from_journal: int = 0
    failed: int = 0
    retries: int = 0
    cut: int = 0
    refused: int = 0
    reasoned: int = 0
    with_ignored_parts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    advice: str = ""
    bad_servers: list[str] = field(default_factory=list)


class Client:
    """Client of one model; see the module.

    Args:
        attempts: number of tries of a request whose errors may be its own.
        patience: seconds of silence from a server, to all of its requests, after which they are sent again. Doubles
            each time, so that a slower answer does arrive. A single request has no limit.
        wait_for_server: seconds to wait for an unreachable server at the start. If none is reached by then, the run
            ends; one of several is named in a warning, and still tried now and then. A server that was reached before
            is waited for without a limit.
        longest_wait: longest Retry-After, in seconds, that is obeyed. A server that is rate limited for as long, from
            the first request on, is given up.
        accept_empty: ask once more for an empty answer and then accept it, since a model may say nothing; evaluations
            need that. Otherwise it is tried `attempts` times and raises EmptyAnswerError; the last one is stored, see
            `ask`. An empty answer with its text in a field of reasoning is never accepted: the server was started
            wrongly.
        longest_absence: see `LONGEST_ABSENCE`.
        format_setting: formats a setting as the command's user writes it, for advice on errors.

    Raises UserError for an invalid `base_url` and an environment variable that is not set.
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
        self._servers = [
            ServerConnection(server, self.backoff, patience, longest_wait, format_setting) for server in servers
        ]
        share_secrets(self._servers)
        has_finish_reasons = journal.has_finish_reasons(model, len(self._servers))
        for server in self._servers:
            server.gives_finish_reasons = has_finish_reasons
        self._policy = FailurePolicy(
            self._servers,
            model,
            journal,
            longest_wait=longest_wait,
            longest_absence=longest_absence,
            wait_for_server=wait_for_server,
        )
        self._limiter = ConcurrencyLimiter(self._servers)
        self._asking: dict[bytes, asyncio.Future[None]] = {}

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._watch_silence())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.counts.bad_servers = self._policy.bad_servers()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        for server in self._servers:
            await server.endpoint.api.close()

    @property
    def concurrency(self) -> int:
        """Return the maximum number of requests in flight."""
        return sum(server.max_limit for server in self._servers)

    @property
    def in_flight(self) -> int:
        """Return the number of requests in flight."""
        return sum(server.in_flight for server in self._servers)

    def server_messages(self) -> list[str]:
        """Return the error, pause or silence of each server without a recent answer, for the progress line."""
        now = time.monotonic()
        messages = []
        for server in self._servers:
            retry = f", next try in {duration(server.paused_until - now)}" if server.paused_until > now else ""
            if server.closed:
                messages.append(f"{server.name}: {server.closed}; it gets no more requests")
            elif server.last_error:
                passed = now - server.failing_since
                is_bounded = server.is_away and not server.endpoint.reached and passed < self._wait_for_server
                bound = f" of {duration(self._wait_for_server)} at most"
                since = f"for {duration(passed)}{bound if is_bounded and len(self._servers) == 1 else ''}"
                messages.append(f"{server.name}: {server.last_error}, {since}{retry}")
            elif retry:
                messages.append(f"{server.name}: {server.pause_reason}{retry}")
            elif server.in_flight and now - server.heard_at > 60:
                messages.append(f"{server.name}: silent for {duration(now - server.heard_at)}")
        return messages + self._policy.stage_messages()

    def blocking_servers(self) -> set[str]:
        """Return the servers that hold up the run: closed, failing without any answer so far, or in a long pause."""
        soon = time.monotonic() + SECONDS_BETWEEN_LINES
        return {
            server.name
            for server in self._servers
            if server.closed or (server.last_error and not server.has_answered) or server.paused_until > soon
        }

    async def ask(
        self, request: Request, *, next_try: Request | None = None, continues_if_empty: bool = False
    ) -> Answer:
        """Return the answer: from the journal, or from a server and then in the journal.

        An empty answer in the journal is asked for again, unless an earlier start continued without one: another answer
        would change what that start wrote. Cancelling leaves nothing behind.

        Args:
            request: the request.
            next_try: the caller's next request after an empty answer; None = the same with the next sample. An earlier
                start continued if the journal holds its answer.
            continues_if_empty: the caller asks nothing in place of an empty answer, and drops no row because of it.

        Raises:
            EmptyAnswerError, RequestFailed, UserError: see the module.
        """
        key = request.key(self.model)
        while (answer := self._find(request, key, next_try, continues_if_empty)) is None and key in self._asking:
            await asyncio.wait([self._asking[key]])  # the same request is in flight: its answer will be in the journal
        if answer is None:
            ended = self._asking[key] = asyncio.get_running_loop().create_future()
            self._policy.begin_request(request.stage, key)
            try:
                answer = await self._ask_servers(key, request)
            except RequestFailed as failure:
                self.counts.failed += 1
                self.counts.advice = self.counts.advice or failure.advice
                self._policy.end_request(request.stage, key)
                self._policy.count_failure(request.stage, failure)
                raise
            finally:
                self._policy.end_request(request.stage, key)
                del self._asking[key]
                ended.set_result(None)
            self._policy.mark_answered(request.stage)
            self.counts.prompt_tokens += answer.prompt_tokens or 0
            self.counts.completion_tokens += answer.completion_tokens or 0
            self.counts.reasoned += bool(answer.reasoning_in)
            self.counts.with_ignored_parts += bool(answer.ignored_part)
        self.counts.answered += 1
        self.counts.from_journal += answer.from_journal
        self.counts.cut += answer.cut
        self.counts.refused += answer.refused
        return answer

    def _find(self, request: Request, key: bytes, next_try: Request | None, continues_if_empty: bool) -> Answer | None:
        """Return the answer in the journal. Raises EmptyAnswerError for an empty one that is not asked for again."""
        answer = self.journal.find(key, request.decoding.max_tokens, accept_empty=True)
        if answer is None or self._accept_empty or not is_empty_answer(answer):
            return answer
        next_try = next_try or replace(request, sample=request.sample + 1)
        if not (continues_if_empty or has_nonempty_answer(self.journal, self.model, next_try)):
            return None
        self.counts.answered += 1
        self.counts.from_journal += 1
        raise EmptyAnswerError(describe_empty(answer), answer)

    async def _ask_servers(self, key: bytes, request: Request) -> Answer:
        """Send a request until it is answered or fails. `errors` counts those that may be its own."""
        errors = empty = tries = 0
        avoid: ServerConnection | None = None
        denied_at: float | None = None
        up_before: Collection[ServerConnection] = ()
        """The servers that answered a probe before the last try."""
        while True:
            server = await self._limiter.acquire(avoid)
            result = await self._send(server, key, request, accept_empty=self._accept_empty and empty > 0)
            if isinstance(result, Answer):
                return result
            if isinstance(result, EmptyAnswerError):
                self.counts.retries += 1
                empty += 1
                if empty >= self.attempts:
                    if not self._accept_empty:  # else a later start would accept it
                        await self.journal.add(key, self.model, request, result.answer)
                    raise EmptyAnswerError(f"{result} ({self.attempts} times)", result.answer)
                avoid = server
                await asyncio.sleep(self.backoff.delay(empty))
                continue
            if result.kind == "fatal":
                await self._policy.close_or_raise(server, result)
            if result.kind == "request":
                raise RequestFailed(result.message, result.advice, about_content=result.about_content)
            if result.kind == "denied":
                server.denied.add(key)
                await self._policy.raise_if_denied(request.stage, server, result, denied_at)
                denied_at = denied_at or time.monotonic()
            if result.kind == "resend":
                continue
            self.counts.retries += 1
            tries += 1
            is_reached = server.endpoint.reached
            errors += result.kind in ("retryable", "incomplete") or (result.kind == "dropped" and is_reached)
            await self._policy.raise_at_start(request.stage, server, result)
            if result.kind == "dropped" and errors >= self.attempts - 1:
                if server in up_before and errors >= self.attempts:
                    raise RequestFailed(f"{result.message} ({self.attempts} times)")
                # The last error counts only if the server is up: the request may not be the cause.
                errors = self.attempts - 1
                up_before = await self._policy.wait_until_up()
            if errors >= self.attempts:
                raise RequestFailed(f"{result.message} ({self.attempts} times)", result.advice)
            avoid = server
            if result.retry_after is None and result.kind != "rate_limited":  # which pauses the server
                delay = self.backoff.delay(tries)
                await asyncio.sleep(delay if server.endpoint.reached else min(delay, LONGEST_START_PAUSE))

    async def _send(
        self, server: ServerConnection, key: bytes, request: Request, *, accept_empty: bool
    ) -> Answer | ServerError | EmptyAnswerError:
        """Send a request once, in a slot that was acquired; release the slot and record the result.

        An answer is in the journal when this returns.
        """
        sent_at = time.monotonic()
        result: Answer | ServerError | None = None
        is_kept = False
        try:
            result = await server.send(self.model, request)
            if isinstance(result, Answer):
                is_kept = not is_empty_answer(result) or (accept_empty and not result.reasoning_in)
        finally:
            self._limiter.uncommitted += is_kept
            self._limiter.release(server)
            server.record(result, sent_at)
            self._limiter.dispatch()
        if isinstance(result, Answer):
            if not is_kept:
                return EmptyAnswerError(describe_empty(result), result)
            try:
                await self.journal.add(key, self.model, request, result)
            finally:
                self._limiter.uncommitted -= 1
                self._limiter.dispatch()
        return result

    async def _watch_silence(self) -> None:
        while True:
            patience = min(server.patience for server in self._servers)
            await asyncio.sleep(min(patience, self._policy.silence) / 8)
            await self._policy.check_silent_servers()
            self._limiter.dispatch()
            for server in self._servers:
                server.interrupt_if_silent()
