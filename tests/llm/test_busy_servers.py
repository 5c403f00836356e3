"""Servers that are busy, slow, unreachable, silent or back again, and the requests they get meanwhile."""

import asyncio
import email.utils
import re
import sqlite3
import time
from pathlib import Path

import pytest
from client_runs import SHORT, about, echo, run
from scripted_server import Asked, Reply, ScriptedServer, error

from train.errors import UserError
from train.llm import progress as rows_module
from train.llm.client import Client
from train.llm.journal import Journal
from train.llm.progress import progress
from train.llm.server import Server


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(tmp_path: Path, form: str, status: int) -> None:
    asked_at: list[float] = []
    due: list[float] = []  # by the server's clock

    async def script(asked: Asked) -> Reply:
        asked_at.append(time.time())
        if len(asked_at) > 1:
            return await echo(asked)
        if form == "date":
            due.append(int(time.time()) + 1.0)
            return error(status, "later", headers={"Retry-After": email.utils.formatdate(due[0], usegmt=True)})
        due.append(time.time() + 0.25)
        return error(
            status, "later", headers={"Retry-After": "0.25"} if form == "seconds" else {"Retry-After-Ms": "250"}
        )

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        # The second request waits too: the limit is of the server, not of one request.
        await asyncio.gather(client.ask(about("a")), client.ask(about("b")))

    run(script, work, tmp_path, concurrency=1)
    assert len(asked_at) == 3
    assert all(at >= due[0] - 0.01 for at in asked_at[1:])


async def first_line_of_the_log(client: Client, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the first line of progress while a row is asked."""
    shown = ""
    async with progress("rows", 10, client):
        asking = asyncio.create_task(client.ask(about("hi")))
        while "\n" not in shown:
            await asyncio.sleep(0.01)
            shown += capsys.readouterr().out
        asking.cancel()
    return shown


def in_an_hour() -> str:
    return email.utils.formatdate(time.time() + 3600, usegmt=True)


@pytest.mark.parametrize("header", ["3600", None])
def test_a_retry_after_of_an_hour_is_obeyed_and_logged_at_once(
    tmp_path: Path, header: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_module, "SECONDS_BETWEEN_LINES", 1e9)  # only lines about a new event

    async def script(asked: Asked) -> Reply:
        if asked.prompt == "good":
            return await echo(asked)
        return error(429, "out of breath", headers={"Retry-After": header or in_an_hour()})

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("good"))  # a server that has answered, and refuses at 2 a.m.
        shown = await first_line_of_the_log(client, capsys)
        assert re.fullmatch(
            rf"rows: 0 of 10 rows .*; {servers[0].url}: 429 Said: out of breath, for [01]s, "
            r"next try in (1h00m|59m5\ds)\n",
            shown,
        )
        assert servers[0].prompts()["hi"] == 1

    run(script, lambda client, servers: asyncio.wait_for(work(client, servers), 60), tmp_path)


YEARS = {
    "seconds": {"Retry-After": "99999999"},
    "a day and a second": {"Retry-After": "86401"},
    "milliseconds": {"Retry-After-Ms": "99999999999"},
    "no number that anyone writes": {"Retry-After": "9" * 300},
    "a date": {"Retry-After": "Wed, 21 Oct 9999 07:28:00 GMT"},
}


@pytest.mark.parametrize("headers", YEARS.values(), ids=YEARS)
def test_a_retry_after_of_years_is_ignored_with_a_note(tmp_path: Path, headers: dict[str, str]) -> None:
    clients: list[Client] = []
    messages: list[str] = []

    async def script(asked: Asked) -> Reply:
        if not asked.times:
            return error(429, "out of breath", headers=headers)
        messages.extend(clients[0].server_messages())
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        clients.append(client)
        assert (await asyncio.wait_for(client.ask(about("hi")), 30)).text == "re: hi"

    run(script, work, tmp_path)
    [line] = messages
    assert "429 Said: out of breath (its Retry-After is not obeyed: it asks for more than 1d00h), for 0s" in line


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_only_rate_limits_is_given_up_after_the_longest_wait(tmp_path: Path, status: int) -> None:
    async def script(asked: Asked) -> Reply:
        return await echo(asked) if asked.prompt == "good" or asked.times > 50 else error(status, "out of breath.")

    async def only_refused(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(UserError) as failure:
            await client.ask(about("hi"))
        assert re.fullmatch(
            rf"{servers[0].url} has not answered; for \d+s it said: {status} Said: out of breath\. "
            r"Start the same command when it takes requests again, or name another server\.",
            str(failure.value),
        )

    async def a_good_one_first(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("good"))
        assert (await client.ask(about("hi"))).text == "re: hi"

    run(script, only_refused, tmp_path, longest_wait=0.02)
    run(script, a_good_one_first, tmp_path, longest_wait=0.02)


def test_the_first_error_before_any_answer_is_logged_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_module, "SECONDS_BETWEEN_LINES", 1e9)

    async def script(asked: Asked) -> Reply:
        return error(429, "out of breath")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        shown = await first_line_of_the_log(client, capsys)
        assert f"; {servers[0].url}: 429 Said: out of breath, for " in shown

    run(script, lambda client, servers: asyncio.wait_for(work(client, servers), 60), tmp_path)


def test_a_server_that_takes_requests_again_is_no_longer_reported_as_unreachable(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await servers[0].__aexit__()
        answer = asyncio.create_task(client.ask(about("hello")))
        while not client.server_messages():
            await asyncio.sleep(0.001)
        assert "can't be reached (" in client.server_messages()[0]
        await servers[0].__aenter__()
        await arrived.wait()
        while "can't be reached" in client.server_messages()[0]:  # the request has arrived: it changes within a moment
            await asyncio.sleep(0.001)
        assert client.server_messages()[0].startswith(f"{servers[0].url}: reached again, no answer yet, for 0s")
        go_on.set()
        await answer
        assert client.server_messages() == []

    async def script(asked: Asked) -> Reply:
        arrived.set()
        await go_on.wait()
        return await echo(asked)

    arrived, go_on = asyncio.Event(), asyncio.Event()
    run(script, work, tmp_path)


def test_the_error_of_a_server_is_shown_until_it_answers(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        assert client.server_messages() == []
        async with servers[0]:
            pass  # and it is away
        asking = asyncio.create_task(client.ask(about("hi")))
        while client.counts.retries < 3:
            await asyncio.sleep(0.001)
        [message] = client.server_messages()
        assert message.startswith(f"{servers[0].url}: can't be reached (")
        async with servers[0]:
            assert (await asking).text == "re: hi"
            assert client.server_messages() == []

    async def inside() -> None:
        with Journal(tmp_path / "answers.sqlite") as journal:
            server = ScriptedServer(echo)
            async with server:
                pass
            async with Client([Server(server.url)], "m", journal, backoff=SHORT) as client:
                await work(client, [server])

    asyncio.run(inside())


class Bounded:
    """A script that takes a number of requests at once and refuses the others.

    `until`: hold each request until this many have arrived.
    """

    def __init__(self, limit: int, until: int = 0) -> None:
        self.limit, self.now, self.refused = limit, 0, 0
        self.until, self.all_there = until, asyncio.Event()

    async def __call__(self, asked: Asked) -> Reply:
        if self.now >= self.limit:
            self.refused += 1
            return error(429, "too many at once")
        self.now += 1
        if self.now >= self.until:
            self.all_there.set()
        await self.all_there.wait()
        await asyncio.sleep(0.005)
        self.now -= 1
        return await echo(asked)


async def ask_all(client: Client, count: int, prefix: str = "") -> None:
    answers = await asyncio.gather(*(client.ask(about(f"{prefix}{number}")) for number in range(count)))
    assert [answer.text for answer in answers] == [f"re: {prefix}{number}" for number in range(count)]


def test_requests_in_flight_stay_at_the_bound_or_at_what_the_server_takes(tmp_path: Path) -> None:
    script = Bounded(1_000, until=16)  # it never ends if 16 are not sent at once

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        await ask_all(client, 200)
        return servers[0].most_in_flight

    assert run(script, work, tmp_path, concurrency=16) == 16


def test_concurrency_falls_on_rate_limits_and_grows_when_the_server_takes_more(tmp_path: Path) -> None:
    script = Bounded(4)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        [server] = client._servers
        await ask_all(client, 300, "few ")
        # Without backing off, 32 at once against 4 would have been refused thousands of times.
        assert script.refused < 300
        assert server.limit < 32
        script.limit, script.refused = 1_000, 0
        await ask_all(client, 150, "many ")
        script.until = 32
        script.all_there.clear()
        await ask_all(client, 32, "all at once ")
        assert script.refused == 0
        assert servers[0].most_in_flight == 32

    run(script, work, tmp_path, concurrency=32)


def test_a_dead_and_a_silent_server_do_not_keep_the_others_waiting(tmp_path: Path) -> None:
    silence = asyncio.Event()

    async def silent(asked: Asked) -> Reply:
        await silence.wait()
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await servers[1].__aexit__()
        asking = [asyncio.create_task(client.ask(about(f"{number}"))) for number in range(300)]
        while len(servers[0].answered) < 296:  # all but the four at the silent one
            await asyncio.sleep(0.001)
        assert len(servers[2].asked) == 4
        silence.set()
        await asyncio.gather(*asking)
        assert sum(server.answered.total() for server in servers) == 300

    run([echo, echo, silent], work, tmp_path, concurrency=4)


def test_a_failed_request_goes_to_another_server(tmp_path: Path) -> None:
    async def broken(asked: Asked) -> Reply:
        return error(500, "oops")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        for number in range(5):
            assert (await client.ask(about(f"{number}"))).text == f"re: {number}"
        assert max(servers[0].prompts().values()) == 1
        assert servers[1].answered.total() == 5

    run([broken, echo], work, tmp_path)


def test_uncommitted_answers_hold_up_new_requests(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("first"))
        other = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # to the journal, a disk that hangs
        asking = asyncio.create_task(ask_all(client, 100))
        while servers[0].answered.total() - 1 < 10:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        # Eight slots and 25% more: the most that a kill could lose.
        assert len(servers[0].asked) - 1 == client._limiter.max_uncommitted == 10
        other.execute("ROLLBACK")
        other.close()
        await asking

    run(echo, work, tmp_path)


def test_a_silent_server_is_asked_again_with_doubled_patience(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.times < 2:
            await asyncio.Event().wait()
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        assert (await client.ask(about("hi"))).text == "re: hi"
        tries = len(servers[0].asked)
        assert tries >= 3
        assert client._servers[0].patience == 0.1 * 2 ** (tries - 1)

    run(script, work, tmp_path, patience=0.1)


def test_a_slow_answer_is_awaited_while_the_server_sends_anything(tmp_path: Path) -> None:
    others: list[str] = []

    async def script(asked: Asked) -> Reply:
        while asked.prompt == "slow" and len(others) < 30:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        others.append(asked.prompt)
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        slow = asyncio.create_task(client.ask(about("slow")))
        for number in range(30):  # in total much longer than its patience
            await client.ask(about(f"{number}"))
        assert (await slow).text == "re: slow"
        assert servers[0].prompts()["slow"] == 1

    run(script, work, tmp_path, patience=1.0)


def test_a_cancelled_request_leaves_nothing_behind(tmp_path: Path) -> None:
    hold = asyncio.Event()

    async def script(asked: Asked) -> Reply:
        await hold.wait()
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        first_one, second = (asyncio.create_task(client.ask(about("hi"))) for _ in range(2))
        while not servers[0].asked:
            await asyncio.sleep(0.001)
        first_one.cancel()
        hold.set()
        assert (await second).text == "re: hi"  # it waited for the answer of the first, and now asks itself
        assert (client.in_flight, client._asking, client._limiter.uncommitted) == (0, {}, 0)

    run(script, work, tmp_path)
