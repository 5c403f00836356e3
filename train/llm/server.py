"""One server: its connections, its key, and what its answers and errors mean."""

import asyncio
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from train.errors import UserError
from train.llm.connections import Connections
from train.llm.failures import LONGEST_WAIT, Trouble, trouble_of, words_of_error
from train.llm.journal import Answer, Request
from train.llm.places import Lane, Pauses
from train.llm.refusals import NameSetting, advice_on, config_setting, said_in
from train.llm.replies import answer_in
from train.llm.request_body import RequestForm, request_body
from train.llm.stream import BrokenStreamError, completion_in, is_stream
from train.progress import duration

OPENAI_HOST = "api.openai.com"

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


class ServerLane(Lane):
    """A server with its connections. `name_setting`: the command's words for a setting that an error is about."""

    def __init__(
        self,
        server: Server,
        pauses: Pauses,
        patience: float,
        longest_wait: float = LONGEST_WAIT,
        name_setting: NameSetting = config_setting,
    ) -> None:
        name, host = _name_and_host(server.base_url)
        if server.concurrency < 1:
            raise UserError(f"concurrency {server.concurrency} of {name} must be at least 1.")
        super().__init__(name, server.concurrency, pauses)
        self.patience, self.longest_wait = patience, longest_wait
        self.has_answered = False
        self.key = self._find_key(server, host)
        self._form = RequestForm(stream=server.stream)
        self._name_setting = name_setting
        self._in_flight: set[asyncio.Timeout] = set()
        self._connections = Connections(server.base_url)
        self.api = openai.AsyncOpenAI(
            base_url=server.base_url,
            api_key=self.key or "none",  # the package wants one; servers without keys don't look at it
            admin_api_key="",
            # The environment may name OpenAI's organization, which is no other server's business.
            default_headers=None if host == OPENAI_HOST else _NOT_SENT,
            max_retries=0,  # retries here would keep a place, and tell no one
            http_client=openai.DefaultAsyncHttpxClient(
                transport=self._connections, timeout=httpx2.Timeout(None, connect=30.0)
            ),
        )
        # Whole, as the package would put it together anew for each request, which was a tenth of a request's work.
        self._address = f"{self.api.base_url}chat/completions"

    def _find_key(self, server: Server, host: str) -> str | None:
        variable = server.key_variable or ("OPENAI_API_KEY" if host == OPENAI_HOST else None)
        if variable is None:
            return None
        if not (key := os.environ.get(variable, "").strip()):
            raise UserError(f"{self.name} needs a key: set the environment variable {variable}.")
        return key

    async def send(self, model: str, request: Request) -> Answer | Trouble:
        """Ask once."""
        body = request_body(model, request, self._form)
        started = time.monotonic()
        interruption = asyncio.timeout(None)
        try:
            async with interruption:
                self._in_flight.add(interruption)
                # The bare response: the package would build a model of it unchecked, and garbage looks like an answer.
                response = await self.api.post(self._address, cast_to=httpx2.Response, body=body)
        except TimeoutError:
            return Trouble("fault", f"nothing heard for {duration(self.patience / 2)}")
        except openai.APIStatusError as error:
            words = self._clean(words_of_error(error.body, error.response.text))
            trouble = self._trouble(error.status_code, error.response, words, error.code)
            return self._refusal(trouble, error.status_code, error.body, error.response, body, request.stage)
        except openai.APIConnectionError as error:
            reached = not isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
            why = str(error.__cause__) or type(error.__cause__).__name__
            if reached:
                return Trouble("fault", self._clean(why))
            return Trouble("gone", f"can't be reached ({self._clean(why)})")
        except UnicodeEncodeError:
            return Trouble("row", "the messages hold half of a surrogate pair, which is no text")
        finally:
            self._in_flight.discard(interruption)
        return await self._read(response, time.monotonic() - started)

    def _refusal(
        self, trouble: Trouble, status: int, error: Any, response: httpx2.Response, body: dict[str, Any], stage: str
    ) -> Trouble:
        """Return the trouble with advice, or "again" where the error asks for another form of request.

        500 is how llama.cpp and transformers serve report what a chat template refuses, and some gateways a 400.
        """
        if status not in (400, 422, 500):
            return trouble
        said = said_in(error, response.text)
        if self._form.adapt(said, body):
            return Trouble("again", "")
        return replace(trouble, advice=advice_on(error, said, body, stage, self._name_setting))

    async def _read(self, response: httpx2.Response, seconds: float) -> Answer | Trouble:
        """Return the answer in a response of status 200."""
        try:
            # Some servers stream although they weren't asked to, and some don't although they were.
            body = await completion_in(response, self.api) if is_stream(response) else response.json()
            return answer_in(body, seconds)
        except BrokenStreamError:
            return Trouble("fault", "the stream ended before the answer did", status=response.status_code)
        except ValueError:
            what = f"no answer but garbage: {self._clean(response.text) or 'an empty body'}"
            return Trouble("fault", what, status=response.status_code)

    def _trouble(self, status: int, response: httpx2.Response, words: str, code: Any) -> Trouble:
        """Return the meaning of an error response."""
        what = f"{status} {response.reason_phrase}: {words}".removesuffix(": ")
        return trouble_of(
            status,
            what,
            code,
            response.headers,
            has_answered=self.has_answered,
            longest_wait=self.longest_wait,
        )

    async def explain(self, model: str, trouble: Trouble) -> str:
        """What a person must know to mend it."""
        said = f"{self.name} answers {trouble.what.rstrip('.')}"
        match trouble.status:
            case 401 | 403 if self.key is None:
                return f"{said}. It wants a key: name the environment variable that holds it as key_variable."
            case 401 | 403:
                return f"{said}. The key in the environment is not accepted for {model}."
            case 404 | 405:
                try:
                    models = [one.id async for one in self.api.models.list(timeout=30)]
                except openai.OpenAIError:
                    return f"{said}. base_url is probably wrong: for most servers it ends in /v1."
                named = ", ".join(sorted(models)[:10]) or "none"
                return f"{said}. It was asked for the model {model!r}; those it names are: {named}."
            case _:
                return (
                    f"{said}. What was answered so far is in the journal; start the same command when this is mended."
                )

    def learn(self, outcome: Answer | Trouble | None, sent_at: float) -> None:
        """Adapt to how a request ended; None: it was cancelled."""
        if isinstance(outcome, Answer):
            self.has_answered = True
            self.answered()
        elif outcome is not None and outcome.kind == "too much":
            self.refused(outcome.what, sent_at, outcome.retry_after)
        elif outcome is not None and outcome.kind in ("fault", "gone"):
            self.failed(outcome.what, sent_at)
            if outcome.what.startswith("can't be reached"):  # not what a gateway in front of it says
                self._connections.when_sent = self._reached
        elif outcome is not None:
            self.heard_at = time.monotonic()

    def _reached(self) -> None:
        """It takes requests again: that it can't be reached is no longer true, and the answer may take its time."""
        self._connections.when_sent = None
        if self.trouble is not None:
            self.trouble, self.trouble_since = "reached again, no answer yet", time.monotonic()

    def interrupt_if_silent(self) -> None:
        """Give up the requests of a server that has said nothing for too long; they are sent again."""
        if self.in_flight and time.monotonic() - self.heard_at > self.patience:
            self.patience *= 2
            for interruption in self._in_flight:
                interruption.reschedule(asyncio.get_running_loop().time())

    def _clean(self, text: str) -> str:
        """The beginning of what a server said, on one line, without the key, which some repeat."""
        text = text.replace(self.key, "***") if self.key else text
        text = re.sub(r"\s+", " ", text).strip()
        return text if len(text) <= 300 else f"{text[:300]}..."


def _name_and_host(base_url: str) -> tuple[str, str]:
    """A server's address as it is shown, without a password that may stand in it, and its host."""
    try:
        address = urlsplit(base_url)
        host, port = address.hostname, address.port
    except ValueError:
        host = None
    if not host or address.scheme not in ("http", "https"):
        raise UserError(f"base_url {base_url!r} is no address: write it like http://localhost:8000/v1.")
    return f"{address.scheme}://{host}{f':{port}' if port else ''}{address.path}", host
