"""One server: send a request, read its answer or error, and adapt to it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from train.errors import UserError
from train.formatting import duration
from train.llm.concurrency import Backoff, ServerSlots
from train.llm.connection.address import format_redirect_target
from train.llm.connection.endpoint import Endpoint
from train.llm.connection.errors import (
    classify_connection_error,
    http_expected,
    proxy_auth_error,
    speaks_http,
    speaks_tls,
    tls_expected,
)
from train.llm.connection.redaction import Redactor
from train.llm.connection.stream import BrokenStreamError, is_stream, read_stream
from train.llm.finish_reasons import BELOW_LIMIT
from train.llm.refusals import SettingFormatter, extract_error_text, format_config_key, suggest_setting
from train.llm.replies import UnusableReplyError, parse_completion
from train.llm.request import Answer, Request
from train.llm.request_body import RequestForm, request_body
from train.llm.server_errors import (
    DENIED,
    LONGEST_WAIT,
    ErrorBody,
    ServerError,
    classify_error,
    is_about_shared_context,
    parse_error,
    parse_error_body,
)

LONGEST_START_PAUSE = 5.0
"""Longest pause, in seconds, before a server that was never reached is tried again: it may be starting."""

ERRORS_BEFORE_TLS_TEST = 4
"""Dropped responses in a row, before any answer, after which the port is tested for TLS."""

SILENT = ServerError(
    "unreachable",
    "accepts connections and sends nothing",
    advice="A model server lists its models at once: is the port right?",
)
"""The error of a server that has never sent a byte, not even a list of its models."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server.

    concurrency: maximum number of requests in flight.
    key_variable: environment variable that holds its key. Without one, OpenAI's own server gets OPENAI_API_KEY, and no
        other server gets any key.
    stream: ask for answers as a stream of events.
    """

    base_url: str
    concurrency: int = 64
    key_variable: str | None = None
    stream: bool = False


class ServerConnection(ServerSlots):
    """A server's slots, connections and state. `format_setting` formats settings in advice on errors."""

    def __init__(
        self,
        server: Server,
        backoff: Backoff,
        patience: float,
        longest_wait: float = LONGEST_WAIT,
        format_setting: SettingFormatter = format_config_key,
    ) -> None:
        self.endpoint = Endpoint(server.base_url, server.key_variable)
        if server.concurrency < 1:
            raise UserError(f"concurrency {server.concurrency} of {self.endpoint.name} must be at least 1.")
        super().__init__(self.endpoint.name, server.concurrency, backoff)
        self.patience, self.longest_wait = patience, longest_wait
        self.was_asked = self.has_answered = False
        self.gives_finish_reasons = False
        """True once any of its answers had a finish_reason, in this start or an earlier one."""
        self.answered_sent_at = 0.0
        """Send time of the newest request that it has answered."""
        self.denied: set[bytes] = set()
        """Keys of the requests that it has denied since its last answer."""
        self.denied_since = 0.0
        self.denials = 0
        """Denials in a row; those of requests that were in flight together count once."""
        self.is_away = False
        """True if the last request did not reach it."""
        self.away_since: float | None = None
        """Send time of the first request that did not reach it, before any response."""
        self._form = RequestForm(stream=server.stream)
        self._format_setting = format_setting
        self._timeouts: set[asyncio.Timeout] = set()
        """Of the requests in flight."""
        self._shared_at = 0.0
        """Time when a request was last sent while others were in flight."""
        self._is_tls_tested = self._is_model_checked = False

    async def send(self, model: str, request: Request) -> Answer | ServerError:
        """Send a request once; return its answer, or the reason why there is none."""
        self.was_asked = True
        body = request_body(model, request, self._form)
        started = time.monotonic()
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._timeouts.add(timeout)
                if len(self._timeouts) > 1:
                    self._shared_at = started
                response = await self.endpoint.post_chat(body)
        except TimeoutError:
            if not self.endpoint.reached:
                return SILENT
            return ServerError("retryable", f"nothing heard for {duration(self.patience / 2)}")
        except openai.APIStatusError as error:
            return self._adapt(await self._read_error(error), error.response, body, request.stage, started)
        except openai.APIConnectionError as error:
            return await self._connection_error(error)
        except UnicodeEncodeError:
            return ServerError("request", "the messages hold half of a surrogate pair, which is not valid text")
        finally:
            self._timeouts.discard(timeout)
        result = await self._read(response, time.monotonic() - started, request.decoding.max_tokens)
        if isinstance(result, ServerError):
            return self._adapt(result, response, body, request.stage, started)
        if not self._is_model_checked:
            self._is_model_checked = True
            return await self._check_model(model, response) or result
        return result

    async def _read(self, response: httpx2.Response, seconds: float, max_tokens: int) -> Answer | ServerError:
        """Return the answer in a response of status 200, or the error, which some gateways send in a 200."""
        body: Any
        try:
            # Some servers stream unasked, and some don't although asked.
            body = await read_stream(response, self.endpoint.api) if is_stream(response) else _json(response)
        except BrokenStreamError:
            return ServerError("incomplete", "the stream ended before the answer did", status=200)
        except ValueError:
            body = None
        # An error may come with choices, which are empty then.
        error = parse_error(body, response.text) if isinstance(body, dict) and body.get("error") else None
        if error is None:
            try:
                answer = parse_completion(body, seconds)
            except UnusableReplyError as unusable:
                error = parse_error(body["choices"][0], response.text)  # of the server behind a gateway
                if error is None or error.status not in (*DENIED, 402, 429, 503, 529):
                    return ServerError("incomplete", self.endpoint.clean(str(unusable)), status=200)
            except ValueError:
                error = parse_error(body, response.text)
            else:
                if self.endpoint.redactor.holds_secret(answer.text, answer.refusal, answer.finish_reason):
                    return ServerError("request", "the answer repeats the server's key, and is not stored")
                return self._infer_finish_reason(answer, max_tokens)
        if error is not None:
            return self._classify(error.implied_status(), response, error)
        text = self.endpoint.clean(response.text) or "an empty body"
        return ServerError("retryable", f"no answer but garbage: {text}", status=200)

    def _infer_finish_reason(self, answer: Answer, max_tokens: int) -> Answer | ServerError:
        """Judge an answer without a finish_reason.

        A server that gives reasons and omits one has broken that answer off. If it never gives any, the length tells
        whether the limit may have cut the answer: in tokens, or in bytes, since no token is shorter than a byte.
        """
        if answer.finish_class != "unstated":
            self.gives_finish_reasons |= answer.finish_class != "tool"  # inferred from a call without any reason
        elif self.gives_finish_reasons:
            message = "the answer has no finish_reason, and those before it had one: it was broken off"
            return ServerError("incomplete", message, status=200)
        elif (answer.completion_tokens or len(answer.text.encode())) < max_tokens:
            return replace(answer, finish_reason=BELOW_LIMIT)
        elif answer.completion_tokens:
            return replace(answer, finish_reason="length")
        return answer

    async def _read_error(self, error: openai.APIStatusError) -> ServerError:
        """Return the meaning of a response that is an error or a redirect."""
        response, status = error.response, error.status_code
        address = self.endpoint.address
        if status == 407 and address.proxy:
            return proxy_auth_error(address)
        if 300 <= status < 400:
            return self._redirect(response)
        if status == 400 and not isinstance(error.body, dict) and await self._is_tls_port():
            return tls_expected(address)
        return self._classify(status, response, parse_error_body(_json(response), response.text))

    def _classify(self, status: int, response: httpx2.Response, body: ErrorBody) -> ServerError:
        """Return the meaning of an error in a response with an error status, or in a 200."""
        prefix = f"{status} {response.reason_phrase}".rstrip()
        if response.status_code == 200:
            prefix = "an error in the body of a 200" if status == 200 else f"{status} in the body of a 200"
        message = self.endpoint.clean(f"{prefix}: {body.message.removeprefix(prefix)}").removesuffix(":")
        address = self.endpoint.address
        proxy = address.proxy
        if proxy and response.status_code in (403, 502, 503, 504):  # may come from the proxy
            message = f"{message.rstrip('.')} (through {proxy})"
        error = classify_error(status, message, body, response.headers, longest_wait=self.longest_wait)
        # An https answer comes from the server itself. Model servers send JSON, proxies web pages.
        if proxy and status == 403 and address.is_plain and not isinstance(_json(response), dict):
            return replace(error, advice=f"The proxy may be what refuses: {proxy.advice}.")
        return error

    def _redirect(self, response: httpx2.Response) -> ServerError:
        message = f"{response.status_code} {self.endpoint.clean(response.reason_phrase)}".rstrip()
        try:
            target = response.request.url.join(response.headers["location"])
        except (KeyError, httpx2.InvalidURL):
            return ServerError("fatal", f"{message}, a redirect to nowhere", status=response.status_code)
        path = response.request.url.path
        address = self.endpoint.address
        if target.host == address.host and target.path == f"{path}/" and not path.endswith("/"):
            # The same server may get the key. Requests that were in flight get the same redirect.
            self.endpoint.chat_url = address.url("chat/completions/")
            return ServerError("resend", "")
        shown = self.endpoint.clean(format_redirect_target(target))
        is_chat_api = target.path.endswith("/chat/completions") and shown != address.shown
        advice = f"Write {shown} as base_url." if is_chat_api else "That is no chat API: is base_url right?"
        return ServerError("fatal", f"{message}: it redirects to {shown}", status=response.status_code, advice=advice)

    async def _connection_error(self, error: openai.APIConnectionError) -> ServerError:
        """Return the meaning of a request without any response."""
        address = self.endpoint.address
        result = classify_connection_error(error.__cause__ or error, address, has_answered=self.has_answered)
        if (
            result.kind in ("retryable", "dropped")
            and self.failures_in_a_row >= ERRORS_BEFORE_TLS_TEST
            and await self._is_tls_port()
        ):
            return tls_expected(address)
        if result.kind == "unreachable" and not self.endpoint.reached and await speaks_http(address):
            return http_expected(address)
        return replace(result, message=self.endpoint.clean(result.message))

    async def _is_tls_port(self) -> bool:
        """Return True if the port speaks TLS. Tested once, and only before any answer."""
        if self._is_tls_tested or self.has_answered:
            return False
        self._is_tls_tested = True
        return await speaks_tls(self.endpoint.address)

    async def _check_model(self, model: str, response: httpx2.Response) -> ServerError | None:
        """Return the error of a server that answers any name with its only model, as llama.cpp's and TGI's do."""
        body = _json(response)
        answered_as = body.get("model") if isinstance(body, dict) else None
        if answered_as in (None, model):
            return None
        names = await self.endpoint.only_model()
        if answered_as not in names or model in names:
            return None
        return ServerError(
            "fatal",
            f"as {names[0]!r}, which is the only model that it serves, and not as {model!r}",
            advice=f"Write {names[0]} as the model's name.",
        )

    def _adapt(
        self, error: ServerError, response: httpx2.Response, body: dict[str, Any], stage: str, started: float
    ) -> ServerError:
        """Return the error with advice, or "resend" if it asks for another form of request.

        llama.cpp and `transformers serve` report the refusals of a chat template with 500, some gateways with 400.
        """
        if error.about_content and self._shared_at >= started and is_about_shared_context(error.message):
            return replace(error, kind="rate_limited", about_content=False)
        if error.status not in (200, 400, 422, 500) or error.about_content or error.advice:
            return error
        content = _json(response)
        if response.status_code == 200 and (not isinstance(content, dict) or content.get("choices")):
            return error  # an unreadable answer
        details = content.get("error") or content if isinstance(content, dict) else content
        text = extract_error_text(details, response.text)
        if self._form.adapt(text, body):
            return ServerError("resend", "")
        return replace(error, advice=suggest_setting(details, text, body, stage, self._format_setting))

    def record(self, result: Answer | ServerError | None, sent_at: float) -> None:
        """Adapt to the result of a request; None = it was cancelled."""
        if isinstance(result, Answer):
            self.has_answered = self.endpoint.reached = True
            self.is_away = False
            self.answered_sent_at = max(self.answered_sent_at, sent_at)
            self.denied.clear()
            self.denials = 0
            self.record_answer()
        elif result is not None:
            self._record_server_error(result, sent_at)

    def _record_server_error(self, error: ServerError, sent_at: float) -> None:
        if error.kind != "unreachable" and (error.status or error.kind in ("request", "resend")):
            self.endpoint.reached = True
        self.is_away = error.kind in ("unreachable", "dropped")
        if self.is_away and self.away_since is None:
            self.away_since = sent_at
        match error.kind:
            case "rate_limited":
                self.record_rate_limit(error.message, sent_at, error.retry_after)
            case "retryable" | "unreachable" | "dropped":
                self.record_failure(error.message, sent_at)
                if not self.endpoint.reached:
                    self.paused_until = min(self.paused_until, time.monotonic() + LONGEST_START_PAUSE)
                if error.is_connection_failure:
                    self.endpoint.connections.on_request_sent = self._record_request_sent
            case "incomplete":
                self.record_incomplete()
            case "denied":
                self.denied_since = self.denied_since if self.denied else time.monotonic()
                before = self.failures_in_a_row
                self.record_error(error.message, sent_at)
                self.denials += self.failures_in_a_row - before
            case _:
                self.heard_at = time.monotonic()

    def _record_request_sent(self) -> None:
        """Note that it takes requests again; the answer may still take long."""
        self.endpoint.connections.on_request_sent = None
        self.is_away = False
        if self.last_error is not None:
            self.last_error, self.failing_since = "reached again, no answer yet", time.monotonic()

    def interrupt_if_silent(self) -> None:
        """Interrupt the requests of a server that was silent for longer than its patience, which doubles."""
        if self.in_flight and time.monotonic() - self.heard_at > self.patience:
            self.patience *= 2
            self.interrupt()

    def interrupt(self) -> None:
        """End the requests in flight; the client sends them again."""
        for timeout in self._timeouts:
            timeout.reschedule(asyncio.get_running_loop().time())


def share_secrets(servers: Sequence[ServerConnection]) -> None:
    """Make every server redact the secrets of all."""
    redactor = Redactor(secret for server in servers for secret in server.endpoint.secrets)
    for server in servers:
        server.endpoint.redactor = redactor


def _json(response: httpx2.Response) -> Any:
    """Return the parsed body of a response; None if it is not JSON."""
    try:
        return response.json()
    except ValueError:
        return None
