"""Servers whose requests in flight share one context, as the slots of llama.cpp do."""

import asyncio
from pathlib import Path

import pytest
from client_runs import about, echo, run
from scripted_server import Asked, Reply, ScriptedServer, error

from train.llm.client import Client
from train.llm.failures import RequestFailed

OUTGROWN = error(500, "Context size has been exceeded.", type="server_error", code=500)
IN_STREAM = b'data: {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}\n\n'
STREAMED = Reply(body=IN_STREAM, headers={"Content-Type": "text/event-stream"})


@pytest.mark.parametrize("refusal", [OUTGROWN, STREAMED], ids=["as a status", "in a stream"])
def test_requests_that_outgrow_a_shared_context_are_retried_with_fewer_in_flight(
    tmp_path: Path, refusal: Reply
) -> None:
    all_there = asyncio.Barrier(4)

    async def script(asked: Asked) -> Reply:
        if asked.number < 4:
            await all_there.wait()
            return refusal
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        answers = await asyncio.gather(*(client.ask(about(str(number))) for number in range(4)))
        assert [answer.text for answer in answers] == [f"re: {number}" for number in range(4)]
        assert (client.counts.failed, client.counts.retries) == (0, 4)
        [server] = servers
        assert server.most_in_flight == 4

    run(script, work, tmp_path, concurrency=4)


def test_a_request_that_outgrows_the_context_by_itself_is_too_long(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return OUTGROWN

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(RequestFailed, match="Context size has been exceeded") as failure:
            await client.ask(about("long"))
        assert failure.value.about_content
        assert len(servers[0].asked) == 1

    run(script, work, tmp_path)
