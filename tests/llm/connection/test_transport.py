"""Connections that a server closes without notice."""

import asyncio
from pathlib import Path

from client_runs import SHORT, about, echo
from scripted_server import Asked, Reply, ScriptedServer, error

from train.llm.client import Client
from train.llm.journal import Journal
from train.llm.server import Server


class ClosesAfterAnError(ScriptedServer):
    """A server that closes a connection after a 500 when the next request is on its way (as uvicorn may)."""

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        keeps_open = await super()._exchange(reader, writer)
        if len(self.asked) > 1:
            return keeps_open
        await reader.read(1)
        return False


def test_no_request_follows_an_error_on_the_same_connection(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return await echo(asked) if asked.number else error(500, "Internal Server Error")

    async def ask() -> None:
        async with ClosesAfterAnError(script) as server:
            with Journal(tmp_path / "answers.sqlite") as journal:
                async with Client([Server(server.url)], "m", journal, backoff=SHORT) as client:
                    assert (await client.ask(about("hi"))).text == "re: hi"
                    assert (client.counts.retries, len(server.asked)) == (1, 2)

    asyncio.run(ask())
