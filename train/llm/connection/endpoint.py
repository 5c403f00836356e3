"""Endpoint of one server: address, API key, HTTP client, model list, and messages without secrets."""

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any

import httpx2
import openai

from train.errors import UserError
from train.llm.connection.address import parse_address
from train.llm.connection.redaction import Redactor
from train.llm.connection.transport import ConnectionPool

OPENAI_HOST = "api.openai.com"
PROBE_SECONDS = 10.0
"""Longest wait for a list of models."""
LONGEST_MESSAGE = 300
"""Characters of a server's message that are shown."""

_USUAL_PATHS = ("/v1", "/api/v1", "/openai/v1")
"""Paths of vLLM, llama.cpp, OpenAI and most others; of OpenRouter and Open WebUI; of Groq and Azure."""
_OMIT = openai.Omit()
_QUOTES = "\"'`"
_HEADER = re.compile(r"authorization\s*:|(?:x-)?api-key\s*:|bearer\s|basic\s", re.IGNORECASE)


class Endpoint:
    """HTTP access to a server. `reached`: it has sent a response of its own.

    `key_variable` names the environment variable with the API key. Without one, OpenAI's own server gets
    OPENAI_API_KEY, and no other server gets any key.

    Raises UserError for an invalid `base_url` and a missing or malformed key.
    """

    def __init__(self, base_url: str, key_variable: str | None) -> None:
        self.address = parse_address(base_url)
        self.name, host = self.address.shown, self.address.host
        variable = key_variable or ("OPENAI_API_KEY" if host == OPENAI_HOST else None)
        self.key = load_api_key(self.name, variable) if variable else None
        self.reached = False
        self.redactor = Redactor(self.secrets)
        self.connections = ConnectionPool(self.address)
        # The environment may name OpenAI's organization, which no other server may see.
        headers: Any = {} if host == OPENAI_HOST else dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), _OMIT)
        if self.key and host.endswith(".azure.com"):
            headers["api-key"] = self.key  # Azure reads keys there; Authorization takes Entra tokens
        self.api = openai.AsyncOpenAI(
            base_url=self.address.base,
            api_key=self.key or "none",  # required by the package; servers without keys ignore it
            admin_api_key="",
            default_headers=headers,
            max_retries=0,  # retries here would hold a slot without notice
            http_client=openai.DefaultAsyncHttpxClient(
                transport=self.connections,
                timeout=httpx2.Timeout(None, connect=30.0),
                follow_redirects=False,  # some turn a POST into a GET, and the key is for this address alone
            ),
        )
        # The complete URL: the package would build it again for each request, 10% of a request's work.
        self.chat_url = self.address.url("chat/completions")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return the key and the passwords of the address and its proxy, which no message may show."""
        return (*filter(None, [self.key]), *self.address.secrets)

    def clean(self, text: str) -> str:
        """Return the beginning of a server's message or an exception's text, on one line and without secrets."""
        text = re.sub(r"\s+", " ", self.redactor.clean(text)).strip()
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."

    async def post_chat(self, body: Mapping[str, Any]) -> httpx2.Response:
        """Send a chat completion request; return the bare response. Raises the errors of the openai package.

        The package would build an unchecked model of the response, in which garbage looks like an answer.
        """
        return await self.api.post(self.chat_url, cast_to=httpx2.Response, body=body)

    async def probe(self) -> int | None:
        """Return the status of a request for the list of models; None without any response."""
        try:
            response = await self._get(self.address.url("models"))
        except openai.APIStatusError as error:
            response = error.response
        except openai.OpenAIError:
            return None
        self.reached = True
        return response.status_code

    async def list_models(self, base: httpx2.URL | None = None) -> list[str] | None:
        """Return the names of the models that it lists, at another base if given; None if it lists none."""
        entries = await self._list_entries(base)
        return None if entries is None else [name for names in entries for name in names]

    async def only_model(self) -> list[str]:
        """Return the names of the one model that it lists; none if it lists several, or none."""
        entries = await self._list_entries()
        return entries[0] if entries and len(entries) == 1 else []

    async def find_base_url(self) -> str | None:
        """Return another address of the server with a chat API, if there is one.

        There is one where models are listed, or where a GET of the chat path is refused (`transformers serve` without a
        cache lists none).
        """
        path = self.address.base.raw_path.decode("ascii").rstrip("/")
        paths = dict.fromkeys([f"{path}/v1", path.removesuffix("/v1"), *_USUAL_PATHS])
        bases = [self.address.with_path(other or "/") for other in paths if other != path]
        for is_chat_api in (self.list_models, self._accepts_chats):
            results = await asyncio.gather(*(is_chat_api(base) for base in bases))
            for base, result in zip(bases, results, strict=True):
                if result:
                    return self.address.format_base(base)
        return None

    async def _list_entries(self, base: httpx2.URL | None = None) -> list[list[str]] | None:
        """Return the models that the server lists, each by its id and its aliases (llama.cpp's)."""
        try:
            response = await self._get(self.address.url("models", base))
            self.reached = True
            body = response.json()
        except openai.APIStatusError:
            self.reached = True
            return None
        except (openai.OpenAIError, ValueError):
            return None
        entries = body.get("data") if isinstance(body, dict) else body  # Together sends the bare list
        if not isinstance(entries, list):
            return None
        models = [_model_names(entry) for entry in entries if isinstance(entry, dict)]
        return [[self.clean(name) for name in names] for names in models if names]

    async def _accepts_chats(self, base: httpx2.URL) -> bool:
        try:
            await self._get(self.address.url("chat/completions", base))
        except openai.APIStatusError as error:
            return error.status_code == 405
        except openai.OpenAIError:
            pass
        return False

    async def _get(self, url: str) -> httpx2.Response:
        return await self.api.get(url, cast_to=httpx2.Response, options={"timeout": PROBE_SECONDS})


def _model_names(entry: Mapping[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    names = [entry.get("id"), *(aliases if isinstance(aliases, list) else ())]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def load_api_key(server: str, variable: str) -> str:
    """Return the key in an environment variable. Raises UserError if it is missing or can't be a key."""
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(f"{server} needs a key: set the environment variable {variable}.")
    if not (key.isascii() and key.isprintable()):
        content = "a line break" if len(key.splitlines()) > 1 else "a control character"
        content = content if key.isascii() else "a character that is not ASCII (a curly quote, an invisible space?)"
        error = f"holds {content}. A key is one line of ASCII characters: set the variable to that alone"
    elif key[0] in _QUOTES or key[-1] in _QUOTES:
        error = "is in quotes. Set the variable without them"
    elif header := _HEADER.match(key):
        error = f"begins with {header[0].strip()!r}. Set the variable to the key alone, without the header"
    elif key.startswith(f"{variable}="):
        error = f"begins with '{variable}='. Set the variable to the key alone"
    else:
        return key
    raise UserError(f"{variable}: the key in this environment variable {error}.")
