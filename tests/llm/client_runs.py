"""Shared parts of the client's tests: a client with scripted servers, and the simplest scripts."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripted_server import Asked, Reply, Script, ScriptedServer, chat_reply

from train.llm.client import Client
from train.llm.concurrency import Backoff
from train.llm.journal import Journal
from train.llm.request import Decoding, Request
from train.llm.server import Server

SHORT = Backoff(initial=0.001, longest=0.01)
LIMIT = Decoding(max_tokens=50, temperature=0.5)


def about(prompt: str, **changes: Any) -> Request:
    return replace(Request("stage", [{"role": "user", "content": prompt}], LIMIT), **changes)


def run(
    script: Script | list[Script],
    work: Callable[[Client, list[ScriptedServer]], Awaitable[Any]],
    folder: Path,
    *,
    concurrency: int = 8,
    key_variable: str | None = None,
    **settings: Any,
) -> Any:
    """Run `work` with a client that has one server for each script."""

    async def inside() -> Any:
        servers = [ScriptedServer(entry) for entry in (script if isinstance(script, list) else [script])]
        for server in servers:
            await server.__aenter__()
        try:
            addresses = [Server(server.url, concurrency, key_variable) for server in servers]
            with Journal(folder / "answers.sqlite") as journal:
                async with Client(addresses, "m", journal, **{"backoff": SHORT, **settings}) as client:
                    return await work(client, servers)
        finally:
            for server in servers:
                await server.__aexit__()

    return asyncio.run(inside())


async def echo(asked: Asked) -> Reply:
    return chat_reply(f"re: {asked.prompt}")


def first(*replies: Reply) -> Script:
    """Return a script that sends these replies to a prompt, one after another, and then its answer."""

    async def script(asked: Asked) -> Reply:
        return replies[asked.times] if asked.times < len(replies) else await echo(asked)

    return script
