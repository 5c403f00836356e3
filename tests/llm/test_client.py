"""The client's handling of everything that a server can answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from client_runs import LIMIT, about, echo, first, run
from scripted_server import Asked, Reply, ScriptedServer, chat_reply, error

from train.errors import UserError
from train.llm.client import Client
from train.llm.failure_policy import FAILURES_OF_STAGE
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.request import Answer, Decoding, Request
from train.llm.server import Server


async def ask_once(client: Client, servers: list[ScriptedServer]) -> tuple[Answer, int, int]:
    answer = await client.ask(about("hi"))
    return answer, len(servers[0].asked), client.counts.retries


def test_an_answer_has_its_token_counts_and_finish_reason(tmp_path: Path) -> None:
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


def test_an_answered_request_is_never_asked_again(tmp_path: Path) -> None:
    async def twice(client: Client, servers: list[ScriptedServer]) -> tuple[list[Answer], int, int]:
        # Some at the same time, some later.
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


def test_a_changed_stage_and_those_that_depend_on_it_are_asked_again(tmp_path: Path) -> None:
    def chain(second: Decoding) -> Callable[[Client, list[ScriptedServer]], Awaitable[list[str]]]:
        async def work(client: Client, servers: list[ScriptedServer]) -> list[str]:
            text = "start"
            for stage, decoding in (("ask_once", LIMIT), ("two", second), ("three", LIMIT)):
                text = (await client.ask(about(text, stage=stage, decoding=decoding))).text
            return [asked.prompt for asked in servers[0].asked]

        return work

    async def warm(asked: Asked) -> Reply:  # the temperature shows in the answer
        return chat_reply(f"{asked.prompt} {asked.body['temperature']}")

    assert run(warm, chain(LIMIT), tmp_path) == ["start", "start 0.5", "start 0.5 0.5"]
    assert run(warm, chain(LIMIT), tmp_path) == []
    assert run(warm, chain(replace(LIMIT, temperature=0.9)), tmp_path) == ["start 0.5", "start 0.5 0.9"]


def test_cut_and_refused_answers_are_marked(tmp_path: Path) -> None:
    replies = {
        "cut": chat_reply("half a", "length"),
        "filtered": chat_reply(None, "content_filter"),
        "declined": chat_reply(None, refusal="I can't."),
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
    "half an answer": replace(chat_reply("hello there"), drop=120),
    "no JSON": Reply(200, b"\xff\xfe\x00 nonsense"),
    "other JSON": Reply(200, ["hello"]),
    "no choices": Reply(200, {"choices": []}),
    "an error that calls itself a success": Reply(200, {"error": {"message": "upstream"}}),
    "a message that is a number": Reply(200, {"choices": [{"message": {"content": 7}}]}),
    "nothing": Reply(200, b""),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_a_passing_error_is_retried(tmp_path: Path, reply: Reply) -> None:
    answer, asked, repeated = run(first(reply, reply, reply), ask_once, tmp_path)
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
        assert isinstance(failure, RequestFailed)
        assert str(failure).endswith("(4 times)")
        assert servers[0].prompts() == {"a": 1, "b": 1, "poison": 4}
        assert client.counts.failed == 1

    run(script, work, tmp_path, attempts=4)


@pytest.mark.parametrize("name", ["too many requests", "overloaded", "a bad gateway"])
def test_the_client_waits_without_a_limit_for_a_busy_or_absent_server(tmp_path: Path, name: str) -> None:
    answer, asked, _ = run(first(*[PASSING[name]] * 40), ask_once, tmp_path, attempts=4)
    assert (answer.text, asked) == ("re: hi", 41)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_fails_only_its_request(tmp_path: Path, status: int) -> None:
    async def script(asked: Asked) -> Reply:
        return error(status, "maximum context length is 8192") if "long" in asked.prompt else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(RequestFailed, match=f"^{status} .*: maximum context length is 8192$"):
            await client.ask(about("long"))
        assert (await client.ask(about("short"))).text == "re: short"
        assert servers[0].prompts() == {"long": 1, "short": 1}

    run(script, work, tmp_path)


def test_half_a_surrogate_pair_fails_its_request_and_is_replaced_in_answers(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return chat_reply("odd \ud83d end \U0001f600")

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        with pytest.raises(RequestFailed, match="surrogate"):
            await client.ask(about("\ud83d"))
        return (await client.ask(about("hi"))).text

    assert run(script, work, tmp_path) == "odd \ufffd end \U0001f600"


async def many_fail(client: Client, servers: list[ScriptedServer]) -> str:
    for number in range(FAILURES_OF_STAGE + 10):
        try:
            await client.ask(about(f"bad {number}"))
        except RequestFailed:
            continue
        except UserError as failure:
            assert number == FAILURES_OF_STAGE - 1
            return str(failure)
    return "went on"


def test_a_stage_without_any_answer_ends_the_run(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, "top_k is no parameter") if "bad" in asked.prompt else await echo(asked)

    async def a_good_one_first(client: Client, servers: list[ScriptedServer]) -> str:
        await client.ask(about("good"))
        return await many_fail(client, servers)

    said_of_it = run(script, many_fail, tmp_path)
    assert said_of_it.startswith("stage stage: none of the first 20")
    assert "top_k is no parameter" in said_of_it
    assert run(script, a_good_one_first, tmp_path) == "went on"
    assert run(script, many_fail, tmp_path) == "went on"  # the journal has an answer of the stage


HOPELESS = {
    "no key": (error(401, "missing key"), "requires a key"),
    "not allowed": (error(403, "forbidden"), "requires a key"),
    "no model": (error(404, "no such model"), "it lists: alpha, beta"),
    "no credit": (error(429, "buy more", code="insufficient_quota"), "in the journal"),
    "unpaid": (error(402, "pay"), "in the journal"),
}


@pytest.mark.parametrize(("reply", "advice"), HOPELESS.values(), ids=HOPELESS)
def test_an_error_of_the_settings_ends_the_run(tmp_path: Path, reply: Reply, advice: str) -> None:
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

    message = run(script, work, tmp_path)
    assert advice in message
    assert reply.body["error"]["message"] in message
    assert "\n" not in message


def test_a_wrong_address_and_a_wrong_model_give_different_errors(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return Reply(404, b"<h1>Not Found</h1>")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(UserError, match="base_url is probably wrong"):
            await client.ask(about("hi"))

    run(script, work, tmp_path)


@pytest.mark.parametrize("reply", [error(500, "no such model"), Reply(200, b"<html>Welcome</html>")])
def test_a_server_that_never_answers_anything_ends_the_run(tmp_path: Path, reply: Reply) -> None:
    async def script(asked: Asked) -> Reply:
        return await echo(asked) if asked.prompt == "good" else reply

    async def only_bad(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(UserError, match=r"has not answered; 8 times in a row it said: .*(such|Welcome)"):
            await asyncio.gather(*(client.ask(about(f"{number}")) for number in range(20)))

    async def a_good_one_first(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("good"))
        failures = await asyncio.gather(
            *(client.ask(about(f"{number}")) for number in range(10)), return_exceptions=True
        )
        assert {type(failure) for failure in failures} == {RequestFailed}

    run(script, only_bad, tmp_path)
    run(script, a_good_one_first, tmp_path)
    run(script, a_good_one_first, tmp_path)  # the good one comes from the journal: the settings were right once


def test_forbidden_after_an_answer_fails_the_request(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(403, "flagged") if asked.prompt == "rude" else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("hi"))
        with pytest.raises(RequestFailed, match="flagged"):
            await client.ask(about("rude"))

    run(script, work, tmp_path)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", ""])
def test_an_invalid_base_url_is_an_error_at_once(tmp_path: Path, url: str) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal, pytest.raises(UserError, match="is not a URL"):
        Client([Server(url)], "m", journal)


def test_the_key_is_sent_only_to_its_server_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"{name}-secret")
    monkeypatch.setenv("MY_KEY", "my-own-secret")

    async def script(asked: Asked) -> Reply:
        key = asked.headers["authorization"]
        return error(401 if asked.prompt == "hopeless" else 400, f"what a key you have: {key}")

    async def work(client: Client, servers: list[ScriptedServer]) -> list[str]:
        messages = []
        for prompt in ("row", "hopeless"):
            with pytest.raises((RequestFailed, UserError)) as failure:
                await client.ask(about(prompt))
            messages.append(str(failure.value))
        headers = "".join(f"{name}: {value}\n" for asked in servers[0].asked for name, value in asked.headers.items())
        return [*messages, headers]

    *messages, headers = run(script, work, tmp_path, key_variable="MY_KEY")
    assert "authorization: Bearer my-own-secret\n" in headers
    assert "OPENAI" not in headers
    assert all("what a key you have: Bearer ***" in each for each in messages)
    *_, headers = run(script, work, tmp_path)  # a server without a key
    assert "secret" not in headers
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "secret" not in shown.out + shown.err + "".join(messages)
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


def test_a_server_with_another_name_for_the_token_limit_gets_that(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if "max_tokens" in asked.body:
            return error(400, "use max_completion_tokens", param="max_tokens", code="unsupported_parameter")
        assert asked.body["max_completion_tokens"] == 50
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        assert [(await client.ask(about(f"{number}"))).text for number in range(3)] == ["re: 0", "re: 1", "re: 2"]
        return len(servers[0].asked)

    assert run(script, work, tmp_path) == 4
