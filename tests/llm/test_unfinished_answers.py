"""Incomplete answers: those that the client asks again, and those that the journal stores."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from client_runs import about, echo, first, run
from scripted_server import Asked, Reply, ScriptedServer, chat_reply

from train.llm.client import Client
from train.llm.failures import EmptyAnswerError, RequestFailed
from train.llm.journal import Journal
from train.llm.request import Answer

FRAGMENT = "Water boils because its"


def broken_off(finish_reason: str | None, **choice: Any) -> Reply:
    reply = chat_reply(FRAGMENT, finish_reason)  # type: ignore[arg-type]
    reply.body["choices"][0] |= choice
    return reply


async def hi(client: Client, servers: list[ScriptedServer]) -> tuple[Answer, int]:
    return await client.ask(about("hi")), len(servers[0].asked)


AGAIN = {
    "abort": broken_off("abort"),
    "error": broken_off("error", error={"code": 502, "message": "upstream"}),
    "an error in a choice that ended": broken_off("stop", error={"message": "upstream"}),
    "cancelled": broken_off("cancelled"),
    "DeepSeek is overloaded": broken_off("insufficient_system_resource"),
    "loading": chat_reply("", "load"),
    "empty": chat_reply(""),
    "blank": chat_reply(" \n\t"),
    "null": chat_reply(None),
    "all in reasoning": chat_reply(None, reasoning_content="hello"),
    "no parts": chat_reply("", content=[]),
    "a picture": chat_reply("", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
}


@pytest.mark.parametrize("reply", AGAIN.values(), ids=AGAIN)
def test_an_unusable_reply_is_asked_again(tmp_path: Path, reply: Reply) -> None:
    answer, asked = run(first(reply, reply), hi, tmp_path)
    assert (answer.text, asked) == ("re: hi", 3)
    again, asked = run(echo, hi, tmp_path)
    assert (again.text, again.from_journal, asked) == ("re: hi", True, 0)


async def no_answer(client: Client, servers: list[ScriptedServer]) -> tuple[RequestFailed, int]:
    with pytest.raises(RequestFailed) as failure:
        await client.ask(about("hi"))
    return failure.value, len(servers[0].asked)


NEVER = {
    "abort": (broken_off("abort"), r"broke the answer off \(finish_reason abort\) \(3 times\)$"),
    "a choice's error": (broken_off("stop", error={"message": "upstream"}), r"upstream \(3 times\)$"),
    "empty": (chat_reply(""), r"^an empty answer \(finish_reason stop\) \(3 times\)$"),
    "all in reasoning": (chat_reply("", reasoning="hello"), r"all of it in reasoning: .* parser .*enable_thinking"),
}


@pytest.mark.parametrize(("reply", "message"), NEVER.values(), ids=NEVER)
def test_after_all_attempts_there_is_no_answer_and_the_next_start_asks_again(
    tmp_path: Path, reply: Reply, message: str
) -> None:
    async def never(asked: Asked) -> Reply:
        return reply

    failure, asked = run(never, no_answer, tmp_path, attempts=3)
    assert asked == 3
    assert isinstance(failure, EmptyAnswerError) == ("empty answer" in str(failure))
    assert re.search(message, str(failure))
    answer, asked = run(echo, hi, tmp_path)
    assert (answer.text, answer.from_journal, asked) == ("re: hi", False, 1)


@pytest.mark.parametrize(("text", "finish_reason"), [(FRAGMENT, "abort"), (FRAGMENT, "error"), ("", "stop"), ("", "")])
def test_a_broken_answer_stored_by_an_earlier_version_is_asked_again(
    tmp_path: Path, text: str, finish_reason: str
) -> None:
    with Journal(tmp_path / "answers.sqlite") as journal:
        answer = Answer(text, finish_reason, None, 7, 4, 0.1)
        asyncio.run(journal.add(about("hi").key("m"), "m", about("hi"), answer))
    answer, asked = run(echo, hi, tmp_path)
    assert (answer.text, asked) == ("re: hi", 1)
    with Journal(tmp_path / "answers.sqlite") as journal:
        kept = journal.find(about("hi").key("m"), 50)
        assert kept
        assert kept.text == "re: hi"


@pytest.mark.parametrize("finish_reason", ["MAX_TOKENS", "model_length", "length"])
def test_an_answer_cut_under_any_reason_is_kept_only_for_its_limit(tmp_path: Path, finish_reason: str) -> None:
    async def cut(asked: Asked) -> Reply:
        return chat_reply(FRAGMENT, finish_reason)

    assert run(cut, hi, tmp_path)[0].cut
    with Journal(tmp_path / "answers.sqlite") as journal:
        assert journal.find(about("hi").key("m"), 50)
        assert journal.find(about("hi").key("m"), 51) is None


def test_an_acceptable_empty_answer_is_asked_once_more(tmp_path: Path) -> None:
    async def nothing(asked: Asked) -> Reply:
        return chat_reply("")

    answer, asked = run(nothing, hi, tmp_path, accept_empty=True)
    assert (answer.text, answer.finish_reason, asked) == ("", "stop", 2)
    answer, asked = run(nothing, hi, tmp_path, accept_empty=True)
    assert (answer.text, answer.from_journal, asked) == ("", True, 0)
    assert run(first(chat_reply("")), hi, tmp_path / "other", accept_empty=True)[0].text == "re: hi"


def test_an_answer_in_a_reasoning_field_is_never_accepted_as_empty(tmp_path: Path) -> None:
    async def misled(asked: Asked) -> Reply:
        return chat_reply(None, reasoning_content="hello")

    failure, asked = run(misled, no_answer, tmp_path, accept_empty=True, attempts=4)
    assert asked == 4
    assert "reasoning_content" in str(failure)


def test_reasoning_beside_an_answer_is_counted_and_not_text(tmp_path: Path) -> None:
    async def reasons(asked: Asked) -> Reply:
        return chat_reply("hello", reasoning_content="hm")

    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        return (await client.ask(about("hi"))).text, client.counts.reasoned

    assert run(reasons, work, tmp_path) == ("hello", 1)


def test_a_missing_finish_reason_is_an_incomplete_answer_if_others_have_one(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return broken_off(None) if asked.prompt == "hi" and asked.times < 2 else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        await client.ask(about("before"))
        answer, asked = await hi(client, servers)
        return answer.text, asked

    assert run(script, work, tmp_path) == ("re: hi", 4)


NO_REASON = {
    "fewer tokens than the limit": (FRAGMENT * 9, 49, ""),
    "as many as the limit": (FRAGMENT, 50, "cut at the token limit"),
    "fewer bytes than the limit": (FRAGMENT, None, ""),
    "counted as none": (FRAGMENT, 0, ""),
    "as many bytes": ("漢" * 17, None, "without a finish_reason"),
}


@pytest.mark.parametrize(("text", "tokens", "unfinished"), NO_REASON.values(), ids=NO_REASON)
def test_a_server_that_never_gives_a_reason(tmp_path: Path, text: str, tokens: int | None, unfinished: str) -> None:
    async def script(asked: Asked) -> Reply:
        reply = chat_reply(text, None)  # type: ignore[arg-type]
        reply.body["usage"]["completion_tokens"] = tokens
        return reply

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        return (await client.ask(about("hi"))).unfinished

    assert run(script, work, tmp_path) == unfinished
    assert run(script, work, tmp_path) == unfinished  # from the journal
