"""OpenAI-compatible server on loopback that answers by a script and records its requests."""

import asyncio
import json
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Asked:
    """A request as the server received it. `times`: earlier requests with the same prompt."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    number: int
    times: int

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"] if "messages" in self.body else ""


@dataclass
class Reply:
    """A response: `body` as JSON, or the bytes. `drop` ends the connection after this many bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None


def chat_reply(text: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    """Return a chat completion; a word is a token."""
    tokens = len((text or "").split())
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return Reply(body={"id": "c", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage})


def error(status: int, message: str, *, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """Return an error in OpenAI's form."""
    return Reply(
        status, {"error": {"message": message, "type": "x", "param": None, "code": None, **more}}, headers or {}
    )


def _bytes_of(reply: Reply) -> bytes:
    """Return the raw bytes of a response."""
    content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    lines = [f"HTTP/1.1 {reply.status} Said", f"Content-Length: {len(content)}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


Script = Callable[[Asked], Awaitable[Reply]]


class ScriptedServer:
    """A server with a script.

    answered: number of complete answers (status 200) by prompt.
    models: the models that it lists; such requests are not in `asked`. None = the script answers them.
    encryption: SSL context of a server with TLS.
    """

    def __init__(
        self, script: Script, models: Sequence[str] | None = None, encryption: ssl.SSLContext | None = None
    ) -> None:
        self.script, self.models, self.encryption = script, models, encryption
        self.asked: list[Asked] = []
        self.answered: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self._seen: Counter[str] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self.encryption else ''}://127.0.0.1:{self._port}/v1"

    async def __aenter__(self) -> Self:
        # The same port after a stop, so that a server can come back.
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, ssl=self.encryption)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def prompts(self) -> Counter[str]:
        """Return the number of requests by prompt, without requests for the models."""
        return Counter(asked.prompt for asked in self.asked if asked.body)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the server stops
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else {}
        if self.models is not None and head[0].startswith("GET "):
            writer.write(_bytes_of(Reply(body={"object": "list", "data": [{"id": name} for name in self.models]})))
            return True
        asked = Asked(body, headers, head[0].split()[1], len(self.asked), 0)
        asked.times = self._seen[asked.prompt]
        self._seen[asked.prompt] += 1
        self.asked.append(asked)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = await self.script(asked)
        finally:
            self.in_flight -= 1
        response = _bytes_of(reply)
        if reply.drop is not None:
            writer.write(response[: reply.drop])
            return False
        if reader.at_eof() or writer.is_closing():
            return False  # the client left: it is not answered
        self.answered[asked.prompt] += reply.status == 200
        writer.write(response)
        await writer.drain()
        return True


said = chat_reply
"""The former name of `chat_reply`."""


@contextmanager
def served(script: Script, models: Sequence[str] | None = None) -> Iterator[ScriptedServer]:
    """Run a server in its own thread, for clients in other processes."""
    server = ScriptedServer(script, models)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result()
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
