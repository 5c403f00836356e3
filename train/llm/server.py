"""One server: its connections, its key, and what its answers and errors mean."""

import asyncio
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from train.errors import UserError
from train.formatting import duration
from train.llm.concurrency import Backoff, ServerSlots
from train.llm.connection.address import parse_address, shown_location
from train.llm.connection.api_keys import load_api_key
from train.llm.connection.diagnosis import explain, is_unreachable, only_model
from train.llm.connection.errors import (
    connection_trouble,
    http_wanted,
    proxy_refusal,
    speaks_http,
    speaks_tls,
    tls_wanted,
)
from train.llm.connection.redaction import Redactor
from train.llm.connection.stream import BrokenStreamError, is_stream, read_stream
from train.llm.connection.transport import Connections
from train.llm.finish_reasons import BELOW_LIMIT
from train.llm.journal import Answer, Request
from train.llm.refusals import SettingFormatter, extract_error_text, format_config_key, suggest_setting
from train.llm.replies import UnusableReplyError, parse_completion
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

OPENAI_HOST = "api.openai.com"

PAUSE_OF_A_START = 5.0
"""Longest pause, in seconds, before a server is tried again that has never been reached: it may be starting."""

FAULTS_OF_A_WRONG_SCHEME = 4
"""After so many responses in a row that broke off, and no answer, we look whether it is TLS that is spoken there."""

SILENT = ServerError(
    "gone",
    "accepts connections and sends nothing",
    advice="A model server lists its models at once: is the port right?",
)
"""The trouble of a server that has never sent a byte, not even a list of its models."""

_NOT_SENT: Any = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server. `concurrency`: how many requests it gets at once, at most.

    `key_variable` names the environment variable that holds its key. Without one, OpenAI's own server gets
    OPENAI_API_KEY, and no other server gets any key. `stream`: ask for answers as a stream of events.
    """

    base_url: str
    concurrency: int = 64
    key_variable: str | None = None
    stream: bool = False


class ServerConnection(ServerSlots):
    """A server with its connections. `format_setting`: the command's words for a setting that an error is about."""

    def __init__(
        self,
        server: Server,
        backoff: Backoff,
        patience: float,
        longest_wait: float = LONGEST_WAIT,
        format_setting: SettingFormatter = format_config_key,
    ) -> None:
        self.address = parse_address(server.base_url)
        name, host = self.address.shown, self.address.host
        if server.concurrency < 1:
            raise UserError(f"concurrency {server.concurrency} of {name} must be at least 1.")
        super().__init__(name, server.concurrency, backoff)
        self.patience, self.longest_wait = patience, longest_wait
        self.has_answered = False
        self.gives_finish_reasons = False
        """True once any of its answers had a finish_reason, in this start or an earlier one."""
        self.answered_sent_at = 0.0
        """When the newest of the requests that it has answered was sent."""
        self.denied: set[bytes] = set()
        """The requests that it has denied since its last answer."""
        self.denied_since = 0.0
        self.denials = 0
        """Number of times in a row that it has denied requests; those that were on their way together count once."""
        self.reached = False
        """True once it has sent a response of its own. Until then pauses are short, for the run's start."""
        self.away_since: float | None = None
        """When the first request was sent that did not reach it, of those before any response."""
        self.is_away = self.was_asked = False
        """True where the last request did not reach it; true once any was sent."""
        variable = server.key_variable or ("OPENAI_API_KEY" if host == OPENAI_HOST else None)
        self.key = load_api_key(name, variable) if variable else None
        self.redactor = Redactor(self.secrets)
        self._form = RequestForm(stream=server.stream)
        self._name_setting = format_setting
        self._in_flight: set[asyncio.Timeout] = set()
        self._shared_at = 0.0
        """When a request was last sent while others were in flight."""
        self._connections = Connections(self.address)
        self._asked_for_tls = self._named_model = False
        self.api = openai.AsyncOpenAI(
            base_url=self.address.base,
            api_key=self.key or "none",  # the package wants one; servers without keys don't look at it
            admin_api_key="",
            default_headers=self._headers(host),
            max_retries=0,  # retries here would keep a place, and tell no one
            http_client=openai.DefaultAsyncHttpxClient(
                transport=self._connections,
                timeout=httpx2.Timeout(None, connect=30.0),
                follow_redirects=False,  # a POST becomes a GET on some, and the key is for this address alone
            ),
        )
        # Whole, as the package would put it together anew for each request, which was a tenth of a request's work.
        self._chat_url = self.address.url("chat/completions")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return what no message may show: the key, and passwords of the address and of its proxy."""
        return (*filter(None, [self.key]), *self.address.secrets)

    def _headers(self, host: str) -> dict[str, Any]:
        # The environment may name OpenAI's organization, which is no other server's business.
        headers = {} if host == OPENAI_HOST else dict(_NOT_SENT)
        if self.key and host.endswith(".azure.com"):
            headers["api-key"] = self.key  # Azure takes keys there; in Authorization it takes tokens of Entra
        return headers

    async def send(self, model: str, request: Request) -> Answer | ServerError:
        """Ask once."""
        self.was_asked = True
        body = request_body(model, request, self._form)
        started = time.monotonic()
        interruption = asyncio.timeout(None)
        try:
            async with interruption:
                self._in_flight.add(interruption)
                if len(self._in_flight) > 1:
                    self._shared_at = started
                # The bare response: the package would build a model of it unchecked, and garbage looks like an answer.
                response = await self.api.post(self._chat_url, cast_to=httpx2.Response, body=body)
        except TimeoutError:
            return ServerError("fault", f"nothing heard for {duration(self.patience / 2)}") if self.reached else SILENT
        except openai.APIStatusError as error:
            return self._refusal(await self.error_response(error), error.response, body, request.stage, started)
        except openai.APIConnectionError as error:
            return await self.connection_failed(error)
        except UnicodeEncodeError:
            return ServerError("row", "the messages hold half of a surrogate pair, which is no text")
        finally:
            self._in_flight.discard(interruption)
        outcome = await self._read(response, time.monotonic() - started, request.decoding.max_tokens)
        if isinstance(outcome, ServerError):
            return self._refusal(outcome, response, body, request.stage, started)
        if not self._named_model:
            self._named_model = True
            return await self._wrong_model(model, response) or outcome
        return outcome

    def _refusal(
        self, trouble: ServerError, response: httpx2.Response, body: dict[str, Any], stage: str, started: float
    ) -> ServerError:
        """Return the trouble with advice, or "again" where the error asks for another form of request.

        500 is how llama.cpp and transformers serve report what a chat template refuses, and some gateways a 400.
        """
        if trouble.about_content and self._shared_at >= started and is_about_shared_context(trouble.what):
            return replace(trouble, kind="too much", about_content=False)
        if trouble.status not in (200, 400, 422, 500) or trouble.about_content or trouble.advice:
            return trouble
        whole = _json(response)
        if response.status_code == 200 and (not isinstance(whole, dict) or whole.get("choices")):
            return trouble  # no error, but an answer that can't be read
        error = whole.get("error") or whole if isinstance(whole, dict) else whole
        said = extract_error_text(error, response.text)
        if self._form.adapt(said, body):
            return ServerError("again", "")
        return replace(trouble, advice=suggest_setting(error, said, body, stage, self._name_setting))

    async def _read(self, response: httpx2.Response, seconds: float, max_tokens: int) -> Answer | ServerError:
        """Return the answer in a response of status 200, or the error in it, which some gateways send so."""
        body: Any
        try:
            # Some servers stream although they weren't asked to, and some don't although they were.
            body = await read_stream(response, self.api) if is_stream(response) else _json(response)
        except BrokenStreamError:
            return ServerError("broken", "the stream ended before the answer did", status=200)
        except ValueError:
            body = None
        # An error may stand beside choices, which are empty then.
        error = parse_error(body, response.text) if isinstance(body, dict) and body.get("error") else None
        if error is None:
            try:
                answer = parse_completion(body, seconds)
            except UnusableReplyError as broken:
                error = parse_error(body["choices"][0], response.text)  # of the server that a gateway asked
                if error is None or error.status not in (*DENIED, 402, 429, 503, 529):
                    return ServerError("broken", self.clean(str(broken)), status=200)
            except ValueError:
                error = parse_error(body, response.text)
            else:
                if self.redactor.holds_secret(answer.text, answer.refusal, answer.finish_reason):
                    return ServerError("row", "the answer repeats the server's key, and is kept nowhere")
                return self._with_reason(answer, max_tokens)
        if error is not None:
            return self._trouble(error.implied_status(), response, error)
        what = f"no answer but garbage: {self.clean(response.text) or 'an empty body'}"
        return ServerError("fault", what, status=200)

    def _with_reason(self, answer: Answer, max_tokens: int) -> Answer | ServerError:
        """Judge an answer without a finish_reason.

        A server that gives reasons and leaves one out has broken that answer off. Of one that never gives any, the
        length tells whether the limit may have cut the answer: in tokens, or in bytes, as no token is shorter.
        """
        if answer.ending != "unstated":
            self.gives_finish_reasons |= answer.ending != "tool"  # which a call says without any reason
        elif self.gives_finish_reasons:
            what = "the answer has no finish_reason, and those before it had one: it was broken off"
            return ServerError("broken", what, status=200)
        elif (answer.completion_tokens or len(answer.text.encode())) < max_tokens:
            return replace(answer, finish_reason=BELOW_LIMIT)
        elif answer.completion_tokens:
            return replace(answer, finish_reason="length")
        return answer

    async def error_response(self, error: openai.APIStatusError) -> ServerError:
        """Return the meaning of a response that is an error or a redirect."""
        response, status = error.response, error.status_code
        if status == 407 and self.address.proxy:
            return proxy_refusal(self.address)
        if 300 <= status < 400:
            return self._redirect(response)
        if status == 400 and not isinstance(error.body, dict) and await self._wants_tls():
            return tls_wanted(self.address)
        return self._trouble(status, response, parse_error_body(_json(response), response.text))

    def _trouble(self, status: int, response: httpx2.Response, error: ErrorBody) -> ServerError:
        """Return the meaning of an error, in a response with the status of one or of a 200."""
        said = f"{status} {response.reason_phrase}".rstrip()
        if response.status_code == 200:
            said = "an error in the body of a 200" if status == 200 else f"{status} in the body of a 200"
        what = self.clean(f"{said}: {error.words.removeprefix(said)}").removesuffix(":")
        proxy = self.address.proxy
        if proxy and response.status_code in (403, 502, 503, 504):  # it may be the proxy that says so
            what = f"{what.rstrip('.')} (through {proxy})"
        trouble = classify_error(status, what, error, response.headers, longest_wait=self.longest_wait)
        # What https answers comes from the server itself. Model servers write JSON, and proxies web pages.
        if proxy and status == 403 and self.address.is_plain and not isinstance(_json(response), dict):
            return replace(trouble, advice=f"The proxy may be what refuses: {proxy.advice}.")
        return trouble

    def _redirect(self, response: httpx2.Response) -> ServerError:
        what = f"{response.status_code} {self.clean(response.reason_phrase)}".rstrip()
        try:
            target = response.request.url.join(response.headers["location"])
        except (KeyError, httpx2.InvalidURL):
            return ServerError("hopeless", f"{what}, a redirect to nowhere", status=response.status_code)
        asked = response.request.url.path
        if target.host == self.address.host and target.path == f"{asked}/" and not asked.endswith("/"):
            # The same server, so that the key may go there. Requests that were under way come here again.
            self._chat_url = self.address.url("chat/completions/")
            return ServerError("again", "")
        shown = self.clean(shown_location(target))
        leads_on = target.path.endswith("/chat/completions") and shown != self.address.shown
        advice = f"Write {shown} as base_url." if leads_on else "That is no chat API: is base_url right?"
        return ServerError("hopeless", f"{what}: it redirects to {shown}", status=response.status_code, advice=advice)

    async def connection_failed(self, error: openai.APIConnectionError) -> ServerError:
        """Return the meaning of a request without any response."""
        cause = error.__cause__ or error
        trouble = connection_trouble(cause, self.address, has_answered=self.has_answered)
        if (
            trouble.kind in ("fault", "dropped")
            and self.failures_in_a_row >= FAULTS_OF_A_WRONG_SCHEME
            and await self._wants_tls()
        ):
            return tls_wanted(self.address)
        if trouble.kind == "gone" and not self.reached and await speaks_http(self.address):
            return http_wanted(self.address)
        return replace(trouble, what=self.clean(trouble.what))

    async def _wants_tls(self) -> bool:
        """Return whether it is TLS that is spoken there: looked at once, and before any answer."""
        if self._asked_for_tls or self.has_answered:
            return False
        self._asked_for_tls = True
        return await speaks_tls(self.address)

    async def _wrong_model(self, model: str, response: httpx2.Response) -> ServerError | None:
        """Return the trouble of a server that answers any name with its only model, as llama.cpp's and TGI's do."""
        body = _json(response)
        answered_as = body.get("model") if isinstance(body, dict) else None
        if answered_as in (None, model):
            return None
        only = await only_model(self) or []
        if answered_as not in only or model in only:
            return None
        return ServerError(
            "hopeless",
            f"as {only[0]!r}, which is the only model that it serves, and not as {model!r}",
            advice=f"Write {only[0]} as the model's name.",
        )

    async def explain(self, model: str, trouble: ServerError) -> str:
        """Return what is wrong and what to do about it."""
        return await explain(self, model, trouble)

    def learn(self, outcome: Answer | ServerError | None, sent_at: float) -> None:
        """Adapt to how a request ended; None: it was cancelled."""
        if isinstance(outcome, ServerError):
            is_own = outcome.status or outcome.kind in ("row", "again")
            self.reached = self.reached or bool(is_own and outcome.kind != "gone")
            self.is_away = outcome.kind in ("gone", "dropped")
            if self.is_away and self.away_since is None:
                self.away_since = sent_at
        if isinstance(outcome, Answer):
            self.has_answered = self.reached = True
            self.is_away = False
            self.answered_sent_at = max(self.answered_sent_at, sent_at)
            self.denied.clear()
            self.denials = 0
            self.answered()
        elif outcome is not None and outcome.kind == "too much":
            self.refused(outcome.what, sent_at, outcome.retry_after)
        elif outcome is not None and outcome.kind in ("fault", "gone", "dropped"):
            self.failed(outcome.what, sent_at)
            if not self.reached:
                self.paused_until = min(self.paused_until, time.monotonic() + PAUSE_OF_A_START)
            if is_unreachable(outcome):
                self._connections.when_sent = self._reached
        elif outcome is not None and outcome.kind == "broken":
            self.broke_off()
        elif outcome is not None and outcome.kind == "denied":
            self.denied_since = self.denied_since if self.denied else time.monotonic()
            before = self.failures_in_a_row
            self.objected(outcome.what, sent_at)
            self.denials += self.failures_in_a_row - before
        elif outcome is not None:
            self.heard_at = time.monotonic()

    def _reached(self) -> None:
        """It takes requests again: that it can't be reached is no longer true, and the answer may take its time."""
        self._connections.when_sent = None
        self.is_away = False
        if self.trouble is not None:
            self.trouble, self.trouble_since = "reached again, no answer yet", time.monotonic()

    def interrupt_if_silent(self) -> None:
        """Give up the requests of a server that has said nothing for too long; they are sent again."""
        if self.in_flight and time.monotonic() - self.heard_at > self.patience:
            self.patience *= 2
            self.interrupt()

    def interrupt(self) -> None:
        """Give up the requests in flight; they are sent again."""
        for interruption in self._in_flight:
            interruption.reschedule(asyncio.get_running_loop().time())

    def clean(self, text: str) -> str:
        """Return the beginning of what a server or an exception says, on one line and without secrets."""
        text = re.sub(r"\s+", " ", self.redactor.clean(text)).strip()
        return text if len(text) <= 300 else f"{text[:300]}..."


def _json(response: httpx2.Response) -> Any:
    """Return the parsed body of a response; None where it is no JSON."""
    try:
        return response.json()
    except ValueError:
        return None
