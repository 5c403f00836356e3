"""What the client does with each thing that a server can answer."""

import asyncio
import email.utils
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Asked, Reply, Script, ScriptedServer, error, said

from train.errors import UserError
from train.llm.client import FAILURES_OF_A_STAGE, Client, NoAnswerError
from train.llm.journal import Answer, Decoding, Journal, Request
from train.llm.places import Pauses
from train.llm.server import Server

SHORT = Pauses(first=0.001, longest=0.01)
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
    """`work` with a client of one server to each script."""

    async def inside() -> Any:
        servers = [ScriptedServer(one) for one in (script if isinstance(script, list) else [script])]
        for server in servers:
            await server.__aenter__()
        try:
            places = [Server(server.url, concurrency, key_variable) for server in servers]
            with Journal(folder / "answers.sqlite") as journal:
                async with Client(places, "m", journal, **{"pauses": SHORT, **settings}) as client:
                    return await work(client, servers)
        finally:
            for server in servers:
                await server.__aexit__()

    return asyncio.run(inside())


async def echo(asked: Asked) -> Reply:
    return said(f"re: {asked.prompt}")


def first(*replies: Reply) -> Script:
    """These replies to a prompt, one after another, and then its answer."""

    async def script(asked: Asked) -> Reply:
        return replies[asked.times] if asked.times < len(replies) else await echo(asked)

    return script


async def one(client: Client, servers: list[ScriptedServer]) -> tuple[Answer, int, int]:
    answer = await client.ask(about("hi"))
    return answer, len(servers[0].asked), client.counts.tries_failed


def test_an_answer_and_what_is_known_of_it(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        messages = [{"role": "system", "content": "Ärger 漢 😀"}, {"role": "user", "content": "hi"}]
        decoding = Decoding(64, 0.7, 0.9, seed=4, stop=("END",), extra={"top_k": 40})
        answer = await client.ask(Request("stage", messages, decoding, sample=2))
        assert (answer.text, answer.finish_reason, answer.refusal) == ("re: hi", "stop", None)
        assert (answer.prompt_tokens, answer.completion_tokens) == (7, 2)
        assert (answer.cut, answer.refused, answer.from_journal) == (False, False, False)
        [asked] = servers[0].asked
        assert asked.path == "/v1/chat/completions"
        assert asked.body == {
            "model": "m",
            "messages": messages,
            "max_tokens": 64,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 6,
            "stop": ["END"],
            "top_k": 40,
        }

    run(echo, work, tmp_path)


def test_what_was_answered_is_not_asked_again_now_or_in_the_next_run(tmp_path: Path) -> None:
    async def twice(client: Client, servers: list[ScriptedServer]) -> tuple[list[Answer], int, int]:
        # Some at the same time, some after the others.
        answers = await asyncio.gather(*(client.ask(about(f"{number % 3}")) for number in range(12)))
        answers += [await client.ask(about(f"{number}")) for number in range(3)]
        return answers, len(servers[0].asked), client.counts.completion_tokens

    answers, asked, tokens = run(echo, twice, tmp_path)
    assert (asked, tokens) == (3, 6)
    assert [answer.text for answer in answers] == [f"re: {number % 3}" for number in range(15)]
    assert sum(answer.from_journal for answer in answers) == 12
    again, asked, tokens = run(echo, twice, tmp_path)
    assert (asked, tokens) == (0, 0)
    assert [answer.text for answer in again] == [answer.text for answer in answers]


def test_a_changed_stage_asks_itself_again_and_what_depends_on_it(tmp_path: Path) -> None:
    def chain(second: Decoding) -> Callable[[Client, list[ScriptedServer]], Awaitable[list[str]]]:
        async def work(client: Client, servers: list[ScriptedServer]) -> list[str]:
            text = "start"
            for stage, decoding in (("one", LIMIT), ("two", second), ("three", LIMIT)):
                text = (await client.ask(about(text, stage=stage, decoding=decoding))).text
            return [asked.prompt for asked in servers[0].asked]

        return work

    async def warm(asked: Asked) -> Reply:  # the temperature shows in what is said
        return said(f"{asked.prompt} {asked.body['temperature']}")

    assert run(warm, chain(LIMIT), tmp_path) == ["start", "start 0.5", "start 0.5 0.5"]
    assert run(warm, chain(LIMIT), tmp_path) == []
    assert run(warm, chain(replace(LIMIT, temperature=0.9)), tmp_path) == ["start 0.5", "start 0.5 0.9"]


def test_cut_and_refused_answers_are_known_as_such(tmp_path: Path) -> None:
    replies = {
        "cut": said("half a", "length"),
        "filtered": said(None, "content_filter"),
        "declined": said(None, refusal="I can't."),
        "nothing": said(""),
        "unsaid": said("x", None),  # type: ignore[arg-type]
    }

    async def script(asked: Asked) -> Reply:
        return replies[asked.prompt]

    async def work(client: Client, servers: list[ScriptedServer]) -> dict[str, tuple[str, bool, bool]]:
        answers = {prompt: await client.ask(about(prompt)) for prompt in replies}
        assert (client.counts.cut, client.counts.refused) == (1, 2)
        return {prompt: (answer.text, answer.cut, answer.refused) for prompt, answer in answers.items()}

    expected = {
        "cut": ("half a", True, False),
        "filtered": ("", False, True),
        "declined": ("", False, True),
        "nothing": ("", False, False),
        "unsaid": ("x", False, False),
    }
    assert run(script, work, tmp_path) == expected
    assert run(script, work, tmp_path) == expected  # from the journal


PASSING = {
    "too many requests": error(429, "slow down"),
    "overloaded": error(503, "loading"),
    "a bad gateway": Reply(502, b"<html>bad gateway</html>"),
    "an internal error": error(500, "oops"),
    "a gateway's timeout": Reply(504, b""),
    "a conflict": error(409, "busy"),
    "a dropped connection": Reply(200, {}, drop=0),
    "half an answer": replace(said("hello there"), drop=120),
    "no JSON": Reply(200, b"\xff\xfe\x00 nonsense"),
    "other JSON": Reply(200, ["hello"]),
    "no choices": Reply(200, {"choices": []}),
    "an error that calls itself a success": Reply(200, {"error": {"message": "upstream"}}),
    "a message that is a number": Reply(200, {"choices": [{"message": {"content": 7}}]}),
    "nothing": Reply(200, b""),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_trouble_that_passes_is_waited_for(tmp_path: Path, reply: Reply) -> None:
    answer, asked, repeated = run(first(reply, reply, reply), one, tmp_path)
    assert answer.text == "re: hi"
    assert (asked, repeated) == (4, 3)


@pytest.mark.parametrize("name", ["an internal error", "a dropped connection", "no JSON", "a gateway's timeout"])
def test_a_request_that_fails_each_time_fails_alone(tmp_path: Path, name: str) -> None:
    async def script(asked: Asked) -> Reply:
        return PASSING[name] if asked.prompt == "poison" else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        tasks = [client.ask(about(prompt)) for prompt in ("a", "poison", "b")]
        a, failure, b = await asyncio.gather(*tasks, return_exceptions=True)
        assert (a.text, b.text) == ("re: a", "re: b")
        assert isinstance(failure, NoAnswerError)
        assert str(failure).endswith("(4 times)")
        assert servers[0].prompts() == {"a": 1, "b": 1, "poison": 4}
        assert client.counts.failed == 1

    run(script, work, tmp_path, attempts=4)


@pytest.mark.parametrize("name", ["too many requests", "overloaded", "a bad gateway"])
def test_a_server_that_is_busy_or_away_is_waited_for_without_end(tmp_path: Path, name: str) -> None:
    answer, asked, _ = run(first(*[PASSING[name]] * 40), one, tmp_path, attempts=4)
    assert (answer.text, asked) == ("re: hi", 41)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_refuses_is_that_rows_failure(tmp_path: Path, status: int) -> None:
    async def script(asked: Asked) -> Reply:
        return error(status, "maximum context length is 8192") if "long" in asked.prompt else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(NoAnswerError, match=f"^{status} .*: maximum context length is 8192$"):
            await client.ask(about("long"))
        assert (await client.ask(about("short"))).text == "re: short"
        assert servers[0].prompts() == {"long": 1, "short": 1}

    run(script, work, tmp_path)


def test_half_a_surrogate_pair_fails_its_row_and_is_mended_in_answers(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return said("odd \ud83d end \U0001f600")

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        with pytest.raises(NoAnswerError, match="surrogate"):
            await client.ask(about("\ud83d"))
        return (await client.ask(about("hi"))).text

    assert run(script, work, tmp_path) == "odd \ufffd end \U0001f600"


async def many_fail(client: Client, servers: list[ScriptedServer]) -> str:
    for number in range(FAILURES_OF_A_STAGE + 10):
        try:
            await client.ask(about(f"bad {number}"))
        except NoAnswerError:
            continue
        except UserError as failure:
            assert number == FAILURES_OF_A_STAGE - 1
            return str(failure)
    return "went on"


def test_a_stage_that_nobody_ever_answered_ends_the_run(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, "top_k is no parameter") if "bad" in asked.prompt else await echo(asked)

    async def a_good_one_first(client: Client, servers: list[ScriptedServer]) -> str:
        await client.ask(about("good"))
        return await many_fail(client, servers)

    said_of_it = run(script, many_fail, tmp_path)
    assert said_of_it.startswith("stage stage: none of the first 20")
    assert "top_k is no parameter" in said_of_it
    assert run(script, a_good_one_first, tmp_path) == "went on"
    assert run(script, many_fail, tmp_path) == "went on"  # the journal knows that the stage has been answered


HOPELESS = {
    "no key": (error(401, "missing key"), "wants a key"),
    "not allowed": (error(403, "forbidden"), "wants a key"),
    "no model": (error(404, "no such model"), "those it names are: alpha, beta"),
    "no credit": (error(429, "buy more", code="insufficient_quota"), "in the journal"),
    "unpaid": (error(402, "pay"), "in the journal"),
}


@pytest.mark.parametrize(("reply", "advice"), HOPELESS.values(), ids=HOPELESS)
def test_what_a_person_must_mend_ends_the_run(tmp_path: Path, reply: Reply, advice: str) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.path.endswith("/models"):
            return Reply(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in ("beta", "alpha")]}
            )
        return reply

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        with pytest.raises(UserError) as failure:
            await client.ask(about("hi"))
        assert len([asked for asked in servers[0].asked if asked.body]) == 1
        return str(failure.value)

    told = run(script, work, tmp_path)
    assert advice in told
    assert reply.body["error"]["message"] in told
    assert "\n" not in told


def test_a_wrong_address_is_told_from_a_wrong_model(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return Reply(404, b"<h1>Not Found</h1>")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(UserError, match="base_url is probably wrong"):
            await client.ask(about("hi"))

    run(script, work, tmp_path)


def test_forbidden_after_an_answer_is_the_rows_failure(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(403, "flagged") if asked.prompt == "rude" else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("hi"))
        with pytest.raises(NoAnswerError, match="flagged"):
            await client.ask(about("rude"))

    run(script, work, tmp_path)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", ""])
def test_what_is_no_address_is_said_at_once(tmp_path: Path, url: str) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal, pytest.raises(UserError, match="is no address"):
        Client([Server(url)], "m", journal)


def test_the_key_is_sent_where_it_belongs_and_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"{name}-secret")
    monkeypatch.setenv("MY_KEY", "my-own-secret")

    async def script(asked: Asked) -> Reply:
        key = asked.headers["authorization"]
        return error(401 if asked.prompt == "hopeless" else 400, f"what a key you have: {key}")

    async def work(client: Client, servers: list[ScriptedServer]) -> list[str]:
        told = []
        for prompt in ("row", "hopeless"):
            with pytest.raises((NoAnswerError, UserError)) as failure:
                await client.ask(about(prompt))
            told.append(str(failure.value))
        seen = "".join(f"{name}: {value}\n" for asked in servers[0].asked for name, value in asked.headers.items())
        return [*told, seen]

    *told, seen = run(script, work, tmp_path, key_variable="MY_KEY")
    assert "authorization: Bearer my-own-secret\n" in seen
    assert "OPENAI" not in seen
    assert all("what a key you have: Bearer ***" in each for each in told)
    *_, seen = run(script, work, tmp_path)  # a server that was given no key
    assert "secret" not in seen
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "secret" not in shown.out + shown.err + "".join(told)
    assert b"secret" not in written


def test_a_key_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("EMPTY", " ")
    with Journal(tmp_path / "answers.sqlite") as journal:
        with pytest.raises(UserError, match="set the environment variable OPENAI_API_KEY"):
            Client([Server("https://api.openai.com/v1")], "m", journal)
        with pytest.raises(UserError, match="set the environment variable EMPTY") as failure:
            Client([Server("http://me:hush@localhost/v1", key_variable="EMPTY")], "m", journal)
    assert "hush" not in str(failure.value)


def test_a_server_that_knows_the_token_limit_by_its_other_name(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if "max_tokens" in asked.body:
            return error(400, "use max_completion_tokens", param="max_tokens", code="unsupported_parameter")
        assert asked.body["max_completion_tokens"] == 50
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        assert [(await client.ask(about(f"{number}"))).text for number in range(3)] == ["re: 0", "re: 1", "re: 2"]
        return len(servers[0].asked)

    assert run(script, work, tmp_path) == 4


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(tmp_path: Path, form: str, status: int) -> None:
    asked_at: list[float] = []
    due: list[float] = []  # what the server said, by its own clock

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
        # The second request waits too: the server spoke for itself, not for one of them.
        await asyncio.gather(client.ask(about("a")), client.ask(about("b")))

    run(script, work, tmp_path, concurrency=1)
    assert len(asked_at) == 3
    assert all(at >= due[0] - 0.01 for at in asked_at[1:])


def test_what_troubles_a_server_is_told_until_it_answers(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        assert client.troubles() == []
        async with servers[0]:
            pass  # and it is away
        asking = asyncio.create_task(client.ask(about("hi")))
        while client.counts.tries_failed < 3:
            await asyncio.sleep(0.001)
        [trouble] = client.troubles()
        assert trouble.startswith(f"{servers[0].url}: can't be reached (")
        async with servers[0]:
            assert (await asking).text == "re: hi"
            assert client.troubles() == []

    async def inside() -> None:
        with Journal(tmp_path / "answers.sqlite") as journal:
            server = ScriptedServer(echo)
            async with server:
                pass
            async with Client([Server(server.url)], "m", journal, pauses=SHORT) as client:
                await work(client, [server])

    asyncio.run(inside())


class Bounded:
    """A script that bears so many requests at once and refuses the others; `until` holds each until so many came."""

    def __init__(self, bears: int, until: int = 0) -> None:
        self.bears, self.now, self.refused = bears, 0, 0
        self.until, self.all_there = until, asyncio.Event()

    async def __call__(self, asked: Asked) -> Reply:
        if self.now >= self.bears:
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


def test_never_more_in_flight_than_the_bound_and_no_fewer_than_it_bears(tmp_path: Path) -> None:
    script = Bounded(1_000, until=16)  # it never ends if 16 are not sent at once

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        await ask_all(client, 200)
        return servers[0].most_in_flight

    assert run(script, work, tmp_path, concurrency=16) == 16


def test_it_backs_off_from_a_server_that_refuses_and_grows_when_it_bears_more(tmp_path: Path) -> None:
    script = Bounded(4)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        [lane] = client._lanes
        await ask_all(client, 300, "few ")
        # Without backing off, 32 at once against 4 would have been refused thousands of times.
        assert script.refused < 300
        assert lane.limit < 32
        script.bears, script.refused = 1_000, 0
        await ask_all(client, 300, "many ")
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
        while len(servers[0].answered) < 296:  # all but the four that the silent one holds
            await asyncio.sleep(0.001)
        assert len(servers[2].asked) == 4
        silence.set()
        await asyncio.gather(*asking)
        assert sum(server.answered.total() for server in servers) == 300

    run([echo, echo, silent], work, tmp_path, concurrency=4)


def test_what_one_server_failed_over_another_one_is_asked(tmp_path: Path) -> None:
    async def broken(asked: Asked) -> Reply:
        return error(500, "oops")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        for number in range(5):
            assert (await client.ask(about(f"{number}"))).text == f"re: {number}"
        assert max(servers[0].prompts().values()) == 1
        assert servers[1].answered.total() == 5

    run([broken, echo], work, tmp_path)


def test_answers_that_cannot_be_written_yet_hold_up_new_requests(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("first"))
        other = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # the disk stands still, as far as the journal can tell
        asking = asyncio.create_task(ask_all(client, 100))
        while servers[0].answered.total() - 1 < 10:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        # Eight places and a quarter more: this many a kill could lose now, and no more.
        assert len(servers[0].asked) - 1 == client._places.most_at_risk == 10
        other.execute("ROLLBACK")
        other.close()
        await asking

    run(echo, work, tmp_path)


def test_a_server_that_says_nothing_at_all_is_asked_again_more_patiently(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.times < 2:
            await asyncio.Event().wait()
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        assert (await client.ask(about("hi"))).text == "re: hi"
        tries = len(servers[0].asked)
        assert tries >= 3
        assert client._lanes[0].patience == 0.1 * 2 ** (tries - 1)

    run(script, work, tmp_path, patience=0.1)


def test_a_slow_answer_is_waited_for_while_the_server_says_anything(tmp_path: Path) -> None:
    others: list[str] = []

    async def script(asked: Asked) -> Reply:
        while asked.prompt == "slow" and len(others) < 30:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        others.append(asked.prompt)
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        slow = asyncio.create_task(client.ask(about("slow")))
        for number in range(30):  # together much longer than its patience
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
        assert (await second).text == "re: hi"  # it waited for the first one's answer, and now asks itself
        assert (client.in_flight, client._asking, client._places.unwritten) == (0, {}, 0)

    run(script, work, tmp_path)
