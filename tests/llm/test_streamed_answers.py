"""Streamed answers: from servers that only stream, and from those that stream unasked."""

import json
from pathlib import Path
from typing import Any

import pytest
from client_runs import about, echo, run
from scripted_server import Asked, Reply, ScriptedServer, error

from train.llm.client import Client
from train.llm.failures import RequestFailed
from train.llm.request import Answer
from train.llm.server import Server

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def events(*chunks: dict[str, Any], done: bool = True, line: str = "\n") -> Reply:
    """Return a response of events as servers send it, with keep-alive comments."""
    parts = [": keep-alive", *(f"data: {json.dumps(entry, ensure_ascii=False)}" for entry in chunks)]
    parts += ["data: [DONE]"] * done
    body = "".join(f"{part}{line}{line}" for part in parts)
    return Reply(body=body.encode(), headers={"Content-Type": "text/event-stream; charset=utf-8"})


WHOLE = (
    chunk(role="assistant", content=""),
    chunk(role="assistant", content="Grüße, "),
    chunk(role="assistant", content="Welt"),
    chunk(finish_reason="length"),
    {**chunk(), "choices": [], "usage": USAGE},
)


def answer_to(reply: Reply, folder: Path, *, tries: int = 1) -> Answer:
    async def script(asked: Asked) -> Reply:
        return reply if asked.times < tries else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> Answer:
        return await client.ask(about("a"))

    return run(script, work, folder)


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_an_unrequested_stream_is_read(tmp_path: Path, line: str) -> None:
    answer = answer_to(events(*WHOLE, line=line), tmp_path)
    assert (answer.text, answer.finish_reason) == ("Grüße, Welt", "length")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (events(chunk(content="a"), chunk("stop", content="b"), done=False), "ab"),  # some never send [DONE]
        (events(chunk(content="a"), {"choices": [{"index": 0, "delta": {"content": "b"}}]}, chunk("stop")), "ab"),
        (events({"choices": []}, chunk(reasoning_content="hm"), chunk("stop", content="ab")), "ab"),  # Azure's first
        (events(chunk(content="ab"), {**chunk("stop"), "choices": [{"index": 0, "finish_reason": "stop"}]}), "ab"),
        (events(chunk("stop", content="ab"), {**chunk(content="x"), "choices": [{"index": 1, "delta": {"content": "x"}}]}), "ab"),
    ],
)  # fmt: skip
def test_forms_of_streams(tmp_path: Path, reply: Reply, text: str) -> None:
    answer = answer_to(reply, tmp_path)
    assert (answer.text, answer.finish_reason) == (text, "stop")


@pytest.mark.parametrize(
    "reply",
    [
        events(chunk(content="half of it"), done=False),  # the connection was closed, and it looks complete
        events(done=False),
        events(chunk(content="half"), {"error": {"message": "CUDA out of memory", "type": "x", "code": 500}}),
        events(chunk(content="half"), {"object": "error", "message": "engine died", "code": 500}),
        Reply(body=b"data: {broken\n\n"),
    ],
)
def test_a_broken_stream_is_asked_again(tmp_path: Path, reply: Reply) -> None:
    assert answer_to(reply, tmp_path, tries=2).text == "re: a"


@pytest.mark.parametrize(
    "refusal",
    [
        "This model only support stream mode, please enable the stream parameter to access the model.",
        "Stream must be set to true",
        "enable thinking can not be support when `stream=False`.",
        "Non-streaming requests are not supported for this model",
        "parameter.enable_thinking必须设置为false才能进行非流式调用",
        "This model requires streaming",
    ],
)
def test_a_server_that_only_streams_is_asked_for_streams(tmp_path: Path, refusal: str) -> None:
    async def script(asked: Asked) -> Reply:
        if not asked.body.get("stream"):
            return error(400, refusal)
        assert asked.body["stream_options"] == {"include_usage": True}
        return events(*WHOLE)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        for name in ("a", "b"):
            answer = await client.ask(about(name))
            assert (answer.text, answer.completion_tokens) == ("Grüße, Welt", 3)
        assert len(servers[0].asked) == 3

    run(script, work, tmp_path)


def test_a_server_configured_to_stream_is_asked_for_streams_at_once(tmp_path: Path) -> None:
    """stream_options are omitted if refused, and an answer without a stream is read as well."""

    async def script(asked: Asked) -> Reply:
        assert asked.body["stream"] is True
        if "stream_options" in asked.body:
            return error(400, "Unrecognized request argument supplied: stream_options")
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        addresses = [Server(servers[0].url, stream=True)]
        async with Client(addresses, "m", client.journal) as streaming:
            assert (await streaming.ask(about("a"))).text == "re: a"
        assert len(servers[0].asked) == 2
        assert (await client.ask(about("a"))).from_journal  # a stream makes no other request

    run(script, work, tmp_path)


def test_a_server_that_refuses_with_and_without_a_stream_is_an_error(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, "This model only support stream mode")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(RequestFailed) as failure:
            await client.ask(about("a"))
        assert "this server can't serve the model" in failure.value.advice
        assert [entry.body.get("stream") for entry in servers[0].asked] == [None, True]

    run(script, work, tmp_path)
