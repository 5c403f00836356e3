"""Scripted server of `benchmark.py sysgen`: answers SYSGEN's four prompts, each after the same time.

    python scripts/benchmarks/sysgen_server.py --latency 0.2 --at-once 64

It prints its port, answers until its standard input is closed, and then prints its figures as JSON. It shares the
machine with the contenders, so it does little: it recognizes a prompt by a phrase in it, has prepared answers that lack
only the row's number, and parses no body. A request above the limit gets 429.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter

STAGES = ("generate", "verify", "answer", "judge")
ROW_MARK = "row-number-"
"""Precedes the row number in each question. The system message names both: no two rows may share one."""

MESSAGE = (
    "<<Role>>You are the adviser who looks after {row}.<</Role>>\n"
    "<<Content>>Name what the question leaves open, and what follows from it.<</Content>>\n"
    "<<Task>>Explain to the user what the text means.<</Task>>\n"
    "<<Action>>Begin with the whole, and go on to its parts one after another.<</Action>>\n"
    "<<Style>>Be matter-of-fact, in short sentences, without praise or filler.<</Style>>\n"
    "<<Background>>The user has read the text once and has little time.<</Background>>\n"
    "<<Format>>Write paragraphs of a few sentences each, without headings.<</Format>>"
)
VERDICTS = "\n".join(
    f"<<{tag}>>: {'None' if tag == 'Tool' else 'Good'}"
    for tag in ("Role", "Content", "Task", "Action", "Style", "Background", "Tool", "Format")
)
ANSWER = " ".join(
    ["The text names a thing, says what it is for, and leaves open when it is to be used; that is the part to ask for."]
    * 12
)
TOKENS = {"generate": 140, "verify": 40, "answer": 300, "judge": 1}


def _response(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _encode_answer(text: str, tokens: int) -> bytes:
    message = {"role": "assistant", "content": text}
    return _response(
        "200 OK",
        json.dumps(
            {
                "id": "chatcmpl-0",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1_000, "completion_tokens": tokens, "total_tokens": 1_000 + tokens},
            }
        ).encode(),
    )


TOO_MANY = _response("429 Too Many Requests", b'{"error": {"message": "too many requests at once", "code": 429}}')
FIXED = {
    "verify": _encode_answer(VERDICTS, TOKENS["verify"]),
    "answer": _encode_answer(ANSWER, TOKENS["answer"]),
    "judge": _encode_answer("Yes", TOKENS["judge"]),
}


def find_stage(body: bytes) -> str:
    """Return the stage that a request belongs to."""
    if b"Judge for each of the eight" in body:
        return "verify"
    if b"An assistant was given a system message and a question" in body:
        return "judge"
    return "generate" if b"The next conversation:" in body else "answer"


def build_response(stage: str, body: bytes) -> bytes:
    """Return the complete response."""
    if stage != "generate":
        return FIXED[stage]
    start = body.rfind(ROW_MARK.encode())
    end = start + len(ROW_MARK)
    while body[end : end + 1].isdigit():
        end += 1
    return _encode_answer(MESSAGE.format(row=body[start:end].decode()), TOKENS["generate"])


class Statistics:
    """Limits of the server, and counts over all connections."""

    def __init__(self, latency: float, at_once: int) -> None:
        self.latency, self.at_once = latency, at_once
        self.in_flight = self.most_in_flight = self.too_many = 0
        self.answered: Counter[str] = Counter()
        self.first_request = self.last_answer = 0.0

    def to_json(self) -> dict[str, object]:
        """Return the figures. `seconds`: from the first request to the last answer."""
        return {
            "answered": {stage: self.answered[stage] for stage in STAGES},
            "too_many": self.too_many,
            "most_at_once": self.most_in_flight,
            "seconds": self.last_answer - self.first_request,
            "server_cpu_seconds": time.process_time(),
        }


class Connection(asyncio.Protocol):
    """Connection of a client, with one request at a time."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and the event loop."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        """Collect a request; handle it when it is complete."""
        self.buffer = self.buffer + data if self.buffer else data
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self.buffer[:head_end].lower()
        at = head.find(b"\r\ncontent-length:")
        length = 0 if at < 0 else int(head[at + 17 :].split(b"\r\n", 1)[0])
        if len(self.buffer) < head_end + 4 + length:
            return
        body, self.buffer = self.buffer[head_end + 4 :], b""
        self._handle(body)

    def _handle(self, body: bytes) -> None:
        statistics = self.statistics
        statistics.first_request = statistics.first_request or time.monotonic()
        if statistics.in_flight >= statistics.at_once:
            statistics.too_many += 1
            self.transport.write(TOO_MANY)
            return
        statistics.in_flight += 1
        statistics.most_in_flight = max(statistics.most_in_flight, statistics.in_flight)
        stage = find_stage(body)
        response = build_response(stage, body)
        if statistics.latency:
            self.loop.call_later(statistics.latency, self._answer, stage, response)
        else:
            self._answer(stage, response)

    def _answer(self, stage: str, response: bytes) -> None:
        statistics = self.statistics
        statistics.in_flight -= 1
        statistics.answered[stage] += 1
        self.transport.write(response)
        statistics.last_answer = time.monotonic()


async def serve(statistics: Statistics) -> None:
    """Answer until standard input is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(statistics), "127.0.0.1", 0, backlog=1_024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(statistics.to_json()), flush=True)


def main() -> None:
    """Serve with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, required=True, help="seconds until each answer")
    parser.add_argument("--at-once", type=int, required=True, help="requests at once")
    options = parser.parse_args()
    asyncio.run(serve(Statistics(options.latency, options.at_once)))


if __name__ == "__main__":
    main()
