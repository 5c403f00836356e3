"""Bare client of `benchmark.py sysgen`: sends SYSGEN's requests and ignores the answers, at the server's limit.

    python -m benchmarks.sysgen_bare '{"base_url": "http://127.0.0.1:8000/v1", ...}'

All requests are built before the first is sent. Connections and the calls of a row don't wait for each other, no
library is involved and nothing is stored: any program that does real work is slower.
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


def build_requests(question: str, answer: str) -> Iterator[tuple[Turns, int]]:
    """Yield the messages and token limits of a row's four calls, given the server's answers."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    yield prompts.generate(turns), 512
    (row,) = re.findall(f"{ROW_MARK}\\d+", question)
    message = parse(MESSAGE.format(row=row)).without({"Tool"}, "judged None")
    yield prompts.verify(message), 256
    yield [{"role": "system", "content": message.text}, {"role": "user", "content": question}], 1_024
    yield prompts.judge(message.text, question, ANSWER), 16


def encode_request(base_url: str, messages: Turns, max_tokens: int) -> bytes:
    """Return the bytes of an HTTP request."""
    address = urlsplit(base_url)
    body = {"model": "scripted", "messages": messages, "max_tokens": max_tokens, "temperature": 0.7}
    payload = json.dumps(body, ensure_ascii=False).encode()
    head = (
        f"POST {address.path}/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Connection(asyncio.Protocol):
    """Connection that sends its next request when the previous one is answered."""

    def __init__(self, requests: Iterator[bytes], ended: asyncio.Future[None]) -> None:
        self.requests, self.ended = requests, ended
        self.answered = 0
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Collect an answer; send the next request when it is complete."""
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator or len(body) < int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0]):
            return
        self.answered += head.startswith(b"HTTP/1.1 200")
        self.buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Report that the server closed the connection."""
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed the connection"))

    def _send(self) -> None:
        request = next(self.requests, None)
        if request is not None:
            self.transport.write(request)
        elif not self.ended.done():
            self.ended.set_result(None)


async def send_all(base_url: str, at_once: int, requests: list[bytes]) -> int:
    """Send all requests over `at_once` connections; return how many were answered with 200."""
    loop, address, rest = asyncio.get_running_loop(), urlsplit(base_url), iter(requests)
    host, port = address.hostname or "", address.port or 80
    connections = []
    for _ in range(at_once):
        _, connection = await loop.create_connection(lambda: Connection(rest, loop.create_future()), host, port)
        connections.append(connection)
    await asyncio.gather(*(connection.ended for connection in connections))
    return sum(connection.answered for connection in connections)


def main() -> None:
    """Send the requests of all rows, and write the number of complete rows."""
    task: dict[str, Any] = json.loads(sys.argv[1])
    requests = []
    with open(task["rows_file"], encoding="utf-8") as lines:
        for line in lines:
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            requests += [encode_request(task["base_url"], *request) for request in build_requests(question, answer)]
    answered = asyncio.run(send_all(task["base_url"], task["concurrency"], requests))
    Path(task["folder"], "result.json").write_text(json.dumps({"rows": answered // 4}), encoding="utf-8")


if __name__ == "__main__":
    main()
