"""Empty answers: the test for one, and the requests that the next start asks again."""

from pathlib import Path
from typing import Any

import pytest
from client_runs import about, echo, run
from scripted_server import Asked, Reply, Script, ScriptedServer, chat_reply

from train.llm.client import Client
from train.llm.failures import EmptyAnswerError

NOTHING = {
    "an end token": "<|im_end|>",
    "another one": "</s>",
    "reasoning that has ended": "<think>\n\n</think>\n\n",
    "long reasoning that has ended": f"<think>{'Hm, Bern or Basel? ' * 40}</think>",
    "both": "<think>hm</think>\n<|eot_id|>",
    "invisible characters": "\u200b\ufeff \u2060",
}
SOMETHING = {
    "reasoning without an end": "<think>hm",
    "a word": "x",
    "a mark": "?",
    "a tag": "<br>",
    "an answer behind reasoning": "<think>hm</think>\n\n<b>Bern</b>",
    "code": "```\n<think></think>\n```",
    "an emoji": "🙂",
}


def replying(text: str) -> Script:
    async def script(asked: Asked) -> Reply:
        return chat_reply(text)

    return script


async def outcome_of_two_tries(client: Client, servers: list[ScriptedServer]) -> tuple[list[str], int]:
    """Return the answer of a caller that asks for the next sample after an empty one, and the number of requests.

    The samples have the same prompt, so the server's script counts its requests.
    """
    texts = []
    for sample in range(3):
        try:
            texts.append((await client.ask(about("hi", sample=sample))).text)
            break
        except EmptyAnswerError:
            texts.append("")
    return texts, len(servers[0].asked)


def empty_for(tries: int) -> Script:
    async def script(asked: Asked) -> Reply:
        return chat_reply("") if asked.times < tries else await echo(asked)

    return script


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_an_empty_answer_is_asked_again(tmp_path: Path, text: str) -> None:
    async def script(asked: Asked) -> Reply:
        return chat_reply(text) if asked.times < 2 else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        return (await client.ask(about("hi"))).text, len(servers[0].asked)

    assert run(script, work, tmp_path) == ("re: hi", 3)


@pytest.mark.parametrize("text", SOMETHING.values(), ids=SOMETHING)
def test_an_answer_with_text_is_accepted(tmp_path: Path, text: str) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        return (await client.ask(about("hi"))).text, len(servers[0].asked)

    assert run(replying(text), work, tmp_path) == (text, 1)
    assert run(replying(text), work, tmp_path) == (text, 0)


def test_reasoning_that_the_token_limit_cut_stays_cut(tmp_path: Path) -> None:
    async def cut(asked: Asked) -> Reply:
        return chat_reply("<think>hm</think>", "length")

    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[bool, int]:
        return (await client.ask(about("hi"))).cut, len(servers[0].asked)

    assert run(cut, work, tmp_path) == (True, 1)


@pytest.mark.parametrize("empty_samples", [1, 2])
def test_an_empty_answer_is_final_once_a_later_sample_has_an_answer(tmp_path: Path, empty_samples: int) -> None:
    texts, asked = run(empty_for(3 * empty_samples), outcome_of_two_tries, tmp_path, attempts=3)
    assert (texts, asked) == ([""] * empty_samples + ["re: hi"], 3 * empty_samples + 1)
    assert run(replying("another"), outcome_of_two_tries, tmp_path, attempts=3) == (texts, 0)


def test_an_empty_answer_without_a_later_sample_is_asked_again(tmp_path: Path) -> None:
    assert run(replying(""), outcome_of_two_tries, tmp_path, attempts=2) == (["", "", ""], 6)
    assert run(echo, outcome_of_two_tries, tmp_path) == (["re: hi"], 1)


@pytest.mark.parametrize("next_prompt", ["other", None])
def test_the_caller_names_the_next_try(tmp_path: Path, next_prompt: str | None) -> None:
    """The next try is another prompt, or none: a row that continues without this answer."""
    settings: dict[str, Any] = {"next_try": about("other")} if next_prompt else {"continues_if_empty": True}

    async def script(asked: Asked) -> Reply:
        return chat_reply("") if asked.prompt == "hi" else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        with pytest.raises(EmptyAnswerError):
            await client.ask(about("hi"), **settings)
        await client.ask(about("other"))
        return len(servers[0].asked)

    assert run(script, work, tmp_path, attempts=2) == 3
    assert run(echo, work, tmp_path) == 0


def test_a_stage_of_empty_answers_counts_as_unanswered(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> bool:
        with pytest.raises(EmptyAnswerError):
            await client.ask(about("hi"))
        return client.journal.has_stage("stage", "m")

    assert run(replying(""), work, tmp_path, attempts=2) is False


def test_a_later_start_knows_that_answers_have_a_finish_reason(tmp_path: Path) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        return (await client.ask(about("hi"))).text, len(servers[0].asked)

    async def before(client: Client, servers: list[ScriptedServer]) -> None:
        await client.ask(about("before"))

    async def broken_once(asked: Asked) -> Reply:
        return chat_reply("half an", None) if asked.times == 0 else await echo(asked)  # type: ignore[arg-type]

    run(echo, before, tmp_path)
    assert run(broken_once, work, tmp_path) == ("re: hi", 2)


@pytest.mark.parametrize("text", ["short", "as long as the limit " * 20])
def test_a_later_start_expects_no_finish_reason_of_a_server_without_any(tmp_path: Path, text: str) -> None:
    async def never(asked: Asked) -> Reply:
        reply = chat_reply(text, None)  # type: ignore[arg-type]
        if asked.prompt == "a call":
            reply.body["choices"][0]["message"]["tool_calls"] = [{"id": "1"}]
        return reply

    async def work(client: Client, servers: list[ScriptedServer]) -> int:
        for prompt in ("hi", "a call", "more"):
            await client.ask(about(prompt))
        return len(servers[0].asked)

    async def later(client: Client, servers: list[ScriptedServer]) -> int:
        await client.ask(about("later"))
        return len(servers[0].asked)

    assert run(never, work, tmp_path) == 3
    assert run(never, later, tmp_path) == 1
