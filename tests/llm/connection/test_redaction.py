"""Secrets: malformed ones are refused, and none is in anything that a run leaves."""

import asyncio
import base64
import html
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from client_runs import SHORT, about, echo, run
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Asked, Reply, ScriptedServer, chat_reply, error, served

from train.errors import UserError
from train.llm.client import Client
from train.llm.connection.redaction import Redactor
from train.llm.failures import RequestFailed
from train.llm.journal import Journal
from train.llm.server import Server
from train.sysgen.config import load_config
from train.sysgen.run import run as run_sysgen

KEY = "sk-9f/Qw+8'x&Z~b{7}\\k=T%u\"M<0>j"
"""A key with all characters that some encoding escapes."""


def forms(key: str) -> Iterator[str]:
    """Return the forms in which programs encode a key, and its halves."""
    yield from (key, repr(key)[1:-1], json.dumps(key)[1:-1], html.escape(key), quote(key), quote(key, safe=""))
    yield from (quote_plus(key), quote(key, safe="").lower(), quote(quote(key)), json.dumps(json.dumps(key))[2:-2])
    yield key.encode().hex()
    yield from (key[: len(key) // 2], key[len(key) // 2 :], key.upper(), key.lower())
    for before in ("", "a", "ab"):  # at every alignment
        for behind in ("", "z", "zz"):
            yield base64.b64encode(f"{before}{key}{behind}".encode()).decode()
    yield base64.urlsafe_b64encode(f":{key}".encode()).decode()


def longest_left(key: str, text: str) -> int:
    """Return the length of the longest part of any form of a key that is still in `text`."""
    longest = 0
    for form in forms(key):
        for start in range(len(form)):
            while form[start : start + longest + 1] in text and start + longest < len(form):
                longest += 1
    return longest


@pytest.mark.parametrize("form", forms(KEY))
def test_every_form_of_a_key_is_redacted(form: str) -> None:
    cleaned = Redactor([KEY]).clean(f"Error: <{form}> is no key")
    assert cleaned.startswith("Error: <")
    assert cleaned.endswith("> is no key")
    assert longest_left(KEY, cleaned) < 8


@given(st.text(string.ascii_letters + string.digits + "-_./+=", min_size=12, max_size=60), st.data())
def test_no_eight_characters_of_any_key_remain(key: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([key, quote(key), json.dumps(key), base64.b64encode(key.encode()).decode()]))
    cut = form[: data.draw(st.integers(8, len(form)))] if len(form) > 8 else form
    cleaned = Redactor([key]).clean(f"what {cut}")
    assert not any(key[start : start + 8] in cleaned for start in range(len(key) - 7))


def test_the_beginning_of_a_key_is_detected_in_an_answer() -> None:
    redactor = Redactor(["sk-live-0123456789abcdefghij"])
    assert redactor.holds_secret("your key is sk-live-01234567 and so on")
    assert not redactor.holds_secret("your key is sk-live-0123456 and so on")
    assert Redactor(["sk-of-14-chars"]).holds_secret("the key sk-of-14-chars")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('"sk-in-quotes-0123456789"', "is in quotes"),
        ("'sk-in-quotes-0123456789'", "is in quotes"),
        ("sk-in-quotes-0123456789`", "is in quotes"),
        ("Bearer sk-prefixed-0123456789", "begins with 'Bearer'"),
        ("bearer  sk-prefixed-0123456789", "begins with 'bearer'"),
        ("Authorization: Bearer sk-prefixed-0123456789", "begins with 'Authorization:'"),
        ("MY_KEY=sk-prefixed-0123456789", "begins with 'MY_KEY='"),
    ],
)
def test_a_key_copied_with_other_text_is_refused_before_any_request(
    key: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with Journal(tmp_path / "answers.sqlite") as journal, pytest.raises(UserError) as failure:
        Client([Server("http://h/v1", key_variable="MY_KEY")], "m", journal)
    assert str(failure.value).startswith(f"MY_KEY: the key in this environment variable {message}. Set the variable")
    assert "0123456789" not in str(failure.value)


@pytest.mark.parametrize("key", ["EMPTY", "none", "x", "sk-abc"])
def test_a_short_key_is_redacted_and_ordinary_words_stay(key: str) -> None:
    redactor = Redactor([key])
    assert redactor.clean(f"Bearer {key}, not accepted") == "Bearer ***, not accepted"
    assert redactor.clean("an exact text") == "an exact text"
    assert not redactor.holds_secret(f"an answer that says {key}")


BAD_KEYS = {
    "two lines": "sk-secret\nOTHER=sk-other",
    "a return": "sk-secret\rmore",
    "a line separator": "sk-secret\u2028more",
    "a tab": "sk-secret\tmore",
    "a bell": "sk-secret\x07",
    "a curly quote": "\u201csk-secret\u201d",
    "a zero-width space": "sk-secret\u200b",
    "a byte order mark": "\ufeffsk-secret",
    "an umlaut": "sk-secrät",
    "bytes that are no text": "sk-secret\udcff",
}


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_key_that_no_header_can_hold_is_refused_before_the_first_request(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with Journal(tmp_path / "answers.sqlite") as journal, pytest.raises(UserError, match=r"^MY_KEY: ") as failure:
        Client([Server("http://127.0.0.1:9/v1", key_variable="MY_KEY")], "m", journal)
    assert "secr" not in str(failure.value)
    assert "other" not in str(failure.value)


def test_white_space_around_a_key_is_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " \tsk-my-key\r\n")

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        await client.ask(about("hi"))
        return servers[0].asked[0].headers["authorization"]

    assert run(echo, work, tmp_path, key_variable="MY_KEY") == "Bearer sk-my-key"


def echoes(write: Callable[[str], str]) -> dict[str, Callable[[str], Reply]]:
    """Replies that repeat the key in every place that a run may report."""
    return {
        "401": lambda key: error(401, f"Incorrect API key provided: Bearer {write(key)}"),
        "500": lambda key: error(500, f"KeyError: {write(key)}"),
        "400": lambda key: error(400, f"bad header {write(key)}", code=f"bad {write(key)}"),
        "429": lambda key: error(429, f"too many of {write(key)}", code="insufficient_quota"),
        "another form of error": lambda key: Reply(422, {"detail": [{"msg": f"no {write(key)}"}]}),
        "garbage": lambda key: Reply(200, f"<html>{'.' * 250}Authorization: {write(key)}</html>".encode()),
        "a redirect": lambda key: Reply(302, {}, {"Location": f"/login?next={quote(write(key))}"}),
        "an answer": lambda key: chat_reply(f"<<Role>>You are {write(key)}.<</Role>>"),
        "a refusal": lambda key: chat_reply(None, refusal=f"I don't like {write(key)}."),
        "a reason to end": lambda key: chat_reply("A text.", f"stopped by {write(key)}"),
    }


WRITERS: tuple[Callable[[str], str], ...] = (
    str,
    repr,
    lambda key: quote(key, safe=""),
    lambda key: json.dumps(key)[1:-1],
    lambda key: base64.b64encode(key.encode()).decode(),
)
LONG_KEY = "sk-proj-" + "".join(random.Random(7).choices(string.ascii_letters + string.digits + "-_+/=", k=48))


@pytest.mark.parametrize("kind", echoes(str))
def test_no_form_of_a_key_is_in_anything_that_a_run_leaves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", LONG_KEY)
    monkeypatch.setattr("train.llm.client.Backoff", lambda: SHORT)

    async def script(asked: Asked) -> Reply:
        write = WRITERS[asked.number % len(WRITERS)]
        return echoes(write)[kind](asked.headers["authorization"].removeprefix("Bearer "))

    source, config = tmp_path / "rows.jsonl", tmp_path / "config.yaml"
    turns = [
        [{"role": "user", "content": f"Why {number}?"}, {"role": "assistant", "content": "So."}] for number in range(8)
    ]
    source.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns), encoding="utf-8")
    with served(script) as server:
        config.write_text(
            f"model: m\nservers:\n- {{base_url: '{server.url}?api-version=1', key_variable: MY_KEY}}\n"
            f"data: {{sources: [{{path: {source}}}]}}\noutput_dir: {tmp_path / 'out'}\ngates: {{language: false}}\n",
            encoding="utf-8",
        )
        try:
            message = str(run_sysgen(load_config(config)).stats.unanswered.lines())
        except UserError as failure:
            message = str(failure)
    shown = capfd.readouterr()
    left = [path.read_bytes().decode("utf-8", "replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left
    for text in (message, shown.out, shown.err, *left):
        assert longest_left(LONG_KEY, text) < 8


def test_the_key_of_one_server_is_redacted_in_messages_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "key-of-the-first-server")
    monkeypatch.setenv("KEY_B", "key-of-the-second-server")

    async def script(asked: Asked) -> Reply:
        return error(400, "known are key-of-the-first-server, key-of-the-second-server and hush-hush")

    async def work() -> None:
        async with ScriptedServer(script) as first, ScriptedServer(script) as other:
            servers = [
                Server(first.url, key_variable="KEY_A"),
                Server(other.url.replace("http://", "http://me:hush-hush@"), key_variable="KEY_B"),
            ]
            with Journal(tmp_path / "answers.sqlite") as journal:
                async with Client(servers, "m", journal) as client:
                    for number in range(4):
                        with pytest.raises(RequestFailed, match=r": known are \*\*\*, \*\*\* and \*\*\*$"):
                            await client.ask(about(f"{number}"))

    asyncio.run(work())
