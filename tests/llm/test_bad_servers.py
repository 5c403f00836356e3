"""Bad servers: ports without a server behind them, silent ones, and one bad server of several."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client_runs import SHORT, about, echo, run
from scripted_server import Asked, Reply, ScriptedServer, error

from train.errors import UserError
from train.llm import failure_policy, startup_check
from train.llm.client import Client
from train.llm.connection import endpoint
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.server import Server
from train.llm.startup_check import check_servers


class Tunnel:
    """A port that takes every connection, and forwards it only while there is a server behind it."""

    def __init__(self, backend: ScriptedServer | None = None) -> None:
        self.backend = backend
        self.connections = 0
        self.is_silent = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Tunnel":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Remove the server behind the port, and the connections to it."""
        self.backend = None
        for task in self._tasks:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self.is_silent:
                await reader.read()  # until the client leaves
            elif self.backend:
                port = int(self.backend.url.split(":")[2].partition("/")[0])
                behind, to = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(self._pass_on(reader, to), self._pass_on(behind, writer))
        self._tasks.discard(task)
        writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()


@contextlib.asynccontextmanager
async def silent_port() -> AsyncIterator[str]:
    """Open a port that takes connections and sends nothing, like a database that waits for its own protocol."""
    held = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for writer in held:
            writer.close()


@contextlib.asynccontextmanager
async def client_of(urls: list[str], folder: Path, **settings: object) -> AsyncIterator[Client]:
    with Journal(folder / "answers.sqlite") as journal:
        servers = [Server(url, concurrency=4) for url in urls]
        async with Client(servers, "m", journal, **{"backoff": SHORT, **settings}) as client:
            yield client


async def ask_all(client: Client, count: int) -> list[str]:
    return [answer.text for answer in await asyncio.gather(*(client.ask(about(f"{n}")) for n in range(count)))]


def expected(count: int) -> list[str]:
    return [f"re: {number}" for number in range(count)]


# Ports without a server behind them


def test_a_port_that_closes_every_connection_ends_the_start_after_the_wait(tmp_path: Path) -> None:
    async def work() -> None:
        async with Tunnel() as tunnel, client_of([tunnel.url], tmp_path, wait_for_server=0.1) as client:
            with pytest.raises(UserError) as failure:
                await ask_all(client, 3)
            assert str(failure.value).startswith(f"{tunnel.url} closes the connection without an answer (")
            assert "The port is open, and no model server answers behind it." in str(failure.value)
            assert "--wait-for-server" in str(failure.value)
            with pytest.raises(UserError, match=r"closes the connection without an answer .* no model server answers"):
                await check_servers([Server(tunnel.url)], "m", backoff=SHORT)

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("attempts", [2, 6])
def test_a_server_that_starts_behind_an_open_port_loses_no_row(tmp_path: Path, attempts: int) -> None:
    async def work() -> None:
        async with (
            ScriptedServer(echo, ["m"]) as server,
            Tunnel() as tunnel,
            client_of([tunnel.url], tmp_path, attempts=attempts) as client,
        ):
            asking = asyncio.create_task(ask_all(client, 8))
            while tunnel.connections < 80:
                await asyncio.sleep(0.001)
            assert re.search(r"closes the connection .*, for \ds of 1m00s at most", client.server_messages()[0])
            tunnel.backend = server
            assert await asking == expected(8)
            assert client.counts.failed == 0

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_server_that_disappears_behind_an_open_port_loses_no_row(tmp_path: Path) -> None:
    async def work() -> None:
        async def script(asked: Asked) -> Reply:
            if asked.number == 9:
                tunnel.cut()
            return await echo(asked)

        async with (
            ScriptedServer(script, ["m"]) as server,
            Tunnel(server) as tunnel,
            client_of([tunnel.url], tmp_path, attempts=3, wait_for_server=0) as client,
        ):
            asking = asyncio.create_task(ask_all(client, 20))
            while tunnel.connections < 150:
                await asyncio.sleep(0.001)
            assert "closes the connection without an answer" in client.server_messages()[0]
            assert "at most" not in client.server_messages()[0]
            tunnel.backend = server
            assert await asking == expected(20)
            assert client.counts.failed == 0

    asyncio.run(asyncio.wait_for(work(), 60))


def test_requests_that_crash_their_connection_fail_alone(tmp_path: Path) -> None:
    """Also if only they are left, so that no other request shows that the server is up."""

    async def script(asked: Asked) -> Reply:
        return Reply(drop=0) if "poison" in asked.prompt else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("good"))
        results = await asyncio.gather(*(client.ask(about(f"poison {n}")) for n in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [RequestFailed] * 3
        assert servers[0].prompts() == {"good": 1, **{f"poison {number}": 4 for number in range(3)}}

    run(script, lambda *of: asyncio.wait_for(work(*of), 60), tmp_path, attempts=4)


# Pauses


def test_answers_in_flight_do_not_hide_a_pause(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.prompt == "limited":
            return error(429, "tokens per day", headers={"Retry-After": "1267"})
        await refused.wait()
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        slow = asyncio.create_task(client.ask(about("slow")))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        limited = asyncio.create_task(client.ask(about("limited")))
        while not client.counts.retries:
            await asyncio.sleep(0.001)
        refused.set()
        assert (await slow).text == "re: slow"
        [line] = client.server_messages()
        assert re.fullmatch(rf"{servers[0].url}: 429 Said: tokens per day, next try in 21m0\ds", line)
        assert client.blocking_servers() == {servers[0].url}
        limited.cancel()

    refused = asyncio.Event()
    run(script, lambda *of: asyncio.wait_for(work(*of), 60), tmp_path)


# Silence


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_policy, "SILENCE_AT_START", 0.1)
    monkeypatch.setattr(endpoint, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(startup_check, "SILENT_ANSWER_SECONDS", 0.1)


@pytest.mark.usefixtures("_impatient")
def test_a_silent_port_gives_a_warning_and_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with silent_port() as url:
            async with client_of([url], tmp_path) as client:
                asking = asyncio.create_task(client.ask(about("hi")))
                warnings = ""
                while not warnings:
                    await asyncio.sleep(0.01)
                    warnings = capsys.readouterr().err
                asking.cancel()
            text = f"{url} accepts connections and sends nothing. A model server lists its models at once: is the port"
            assert warnings.startswith(f"warning: {text}")
            with pytest.raises(UserError) as failure:
                await check_servers([Server(url)], "m", backoff=SHORT)
            assert str(failure.value).startswith(text)
            async with ScriptedServer(echo) as good:  # one of several is a warning
                await check_servers([Server(url), Server(good.url)], "m", backoff=SHORT)
            assert capsys.readouterr().err.startswith(f"warning: {text}")

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("listed", [Reply(200, {"data": [{"id": "m"}]}), error(404, "no list")])
def test_a_server_that_loads_its_model_for_the_first_answer_is_not_silent(
    listed: Reply, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(asked: Asked) -> Reply:
        if not asked.body:
            looks.append(asked)
            return listed
        while len(looks) < 3:  # each silence is probed, and this is the third
            await asyncio.sleep(0.01)
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        asking = asyncio.create_task(client.ask(about("hi")))
        while not looks:
            await asyncio.sleep(0.01)
        looks.extend(looks[:1] * 2)
        assert (await asking).text == "re: hi"
        assert servers[0].prompts() == {"hi": 1}

    looks: list[Asked] = []
    run(script, lambda *of: asyncio.wait_for(work(*of), 60), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_impatient")
def test_the_other_servers_get_the_requests_of_a_silent_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_policy, "SILENCE_AT_START", 0.5)  # the other one answers before

    async def work() -> None:
        async with silent_port() as url, ScriptedServer(echo) as good, client_of([url, good.url], tmp_path) as client:
            assert await ask_all(client, 20) == expected(20)
            assert client.counts.failed == 0
            server = client._servers[0]
            assert (server.suspended, server.in_flight) == (True, 0)
            assert await ask_all(client, 40) == expected(40)  # none of them waits for it
            assert server.in_flight == 0
        [note] = client.counts.bad_servers
        assert note.startswith(f"{url} never gave an answer (accepts connections and sends nothing).")
        assert "Its requests are sent to the other servers." in capsys.readouterr().err

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.usefixtures("_impatient")
def test_a_silent_server_that_recovers_gets_requests_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with ScriptedServer(echo, ["m"]) as server, Tunnel() as tunnel, ScriptedServer(echo) as good:
            tunnel.is_silent = True
            async with client_of([tunnel.url, good.url], tmp_path) as client:
                assert await ask_all(client, 20) == expected(20)
                silent = client._servers[0]
                assert silent.suspended
                tunnel.is_silent, tunnel.backend = False, server
                while silent.suspended:
                    await asyncio.sleep(0.01)
                assert await ask_all(client, 80) == expected(80)
                assert server.answered
            assert client.counts.bad_servers == []

    asyncio.run(asyncio.wait_for(work(), 60))


# One bad server of several


@pytest.mark.parametrize("answered_before", [0, 5])
@pytest.mark.parametrize("reply", [error(401, "bad key"), error(403, "not yours"), error(402, "pay")])
def test_a_key_refused_by_one_of_several_closes_only_that_server(
    answered_before: int, reply: Reply, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refusing(asked: Asked) -> Reply:
        return await echo(asked) if asked.number < answered_before else reply

    clients: list[Client] = []

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        clients.append(client)
        url = servers[1].url
        number = 0
        while not client._servers[1].closed:
            number += 8
            assert (await ask_all(client, number))[-8:] == expected(number)[-8:]
        asked = len(servers[1].asked)
        assert await ask_all(client, number + 30) == expected(number + 30)
        assert len(servers[1].asked) <= asked + 4  # those in flight
        assert client.counts.failed == 0
        warnings = capsys.readouterr().err
        assert warnings.count(f"warning: {url} answers {reply.status} Said: ") == 1
        assert "the run continues with the other servers" in warnings
        assert f"{url}: {reply.status} Said" in client.server_messages()[0]

    run([echo, refusing], lambda *of: asyncio.wait_for(work(*of), 60), tmp_path, concurrency=4)
    [note] = clients[0].counts.bad_servers
    assert f"got no more requests after its answer: {reply.status} Said" in note


def test_the_last_of_several_that_refuses_its_key_ends_the_run(tmp_path: Path) -> None:
    async def refusing(asked: Asked) -> Reply:
        return error(401, "bad key")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(UserError) as failure:
            await ask_all(client, 20)
        assert all(server.url in str(failure.value) for server in servers)
        assert "bad key. It requires a key" in str(failure.value)

    run([refusing] * 3, lambda *of: asyncio.wait_for(work(*of), 60), tmp_path)


def test_a_server_that_only_fails_is_named_at_the_end(tmp_path: Path) -> None:
    async def broken(asked: Asked) -> Reply:
        return error(500, "CUDA error")

    async def work(client: Client, servers: list[ScriptedServer]) -> Client:
        assert await ask_all(client, 30) == expected(30)
        return client

    client = run([echo, broken], work, tmp_path)
    assert re.search(r"never gave an answer \(500 Said: CUDA error\)", client.counts.bad_servers[0])
    again = run([echo, broken], work, tmp_path)  # nothing was asked
    assert again.counts.bad_servers == []
