"""The bare client of `benchmark.py sysgen`: asks what SYSGEN asks and does nothing with it; the server's own limit.

    python scripts/benchmarks/sysgen_bare.py '{"base_url": "http://127.0.0.1:8000/v1", ...}'

The requests are ready before the first one is sent. No connection waits for another one, nor a row's second call for
its first, no library stands in between, and nothing is kept: a program that does something is slower than this.
"""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.sysgen_server import ANSWER, MESSAGE, ROW_MARK
from train.sysgen import prompts
from train.sysgen.tags import parse

Turns = list[dict[str, str]]


def requests_of(question: str, answer: str) -> Iterator[tuple[Turns, int]]:
    """The messages and token limits of a row's four calls, as the server's answers make them."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    yield prompts.generate(turns), 512
    (row,) = re.findall(f"{ROW_MARK}\\d+", question)
    message = parse(MESSAGE.format(row=row)).without({"Tool"}, "judged None")
    yield prompts.verify(message), 256
    yield [{"role": "system", "content": message.text}, {"role": "user", "content": question}], 1_024
    yield prompts.judge(message.text, question, ANSWER), 16


def as_bytes(base_url: str, messages: Turns, max_tokens: int) -> bytes:
    """A request as it goes over the wire."""
    address = urlsplit(base_url)
    body = {"model": "scripted", "messages": messages, "max_tokens": max_tokens, "temperature": 0.7}
    payload = json.dumps(body, ensure_ascii=False).encode()
    head = (
        f"POST {address.path}/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the last one is answered."""

    def __init__(self, requests: Iterator[bytes], ended: asyncio.Future[None]) -> None:
        self.requests, self.ended = requests, ended
        self.answered = 0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first one."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Part of an answer, mostly all of it."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]):
            return
        self.answered += head.startswith(b"HTTP/1.1 200")
        self.buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """The server is gone."""
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))

    def _send(self) -> None:
        request = next(self.requests, None)
        if request is not None:
            self.transport.write(request)
        elif not self.ended.done():
            self.ended.set_result(None)


async def ask(base_url: str, at_once: int, requests: list[bytes]) -> int:
    """Ask them all on so many connections; how many were answered with 200."""
    loop, address, rest = asyncio.get_running_loop(), urlsplit(base_url), iter(requests)
    host, port = address.hostname or "", address.port or 80
    connections = []
    for _ in range(at_once):
        _, connection = await loop.create_connection(lambda: Connection(rest, loop.create_future()), host, port)
        connections.append(connection)
    await asyncio.gather(*(connection.ended for connection in connections))
    return sum(connection.answered for connection in connections)


def main() -> None:
    """Ask, and write down how many rows are complete."""
    task: dict[str, Any] = json.loads(sys.argv[1])
    requests = []
    with open(task["rows_file"], encoding="utf-8") as lines:
        for line in lines:
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            requests += [as_bytes(task["base_url"], *one) for one in requests_of(question, answer)]
    answered = asyncio.run(ask(task["base_url"], task["concurrency"], requests))
    Path(task["folder"], "result.json").write_text(json.dumps({"rows": answered // 4}), encoding="utf-8")


if __name__ == "__main__":
    main()
