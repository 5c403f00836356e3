"""Refused requests: the client sends the form that a server asks for, and names the setting of other refusals.

The errors are quoted from reports about servers and gateways.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from client_runs import LIMIT, about, echo, run
from scripted_server import Asked, Reply, ScriptedServer, chat_reply, error

from train.errors import UserError
from train.llm.client import Client
from train.llm.failures import RequestFailed
from train.llm.refusals import (
    extract_error_text,
    format_config_key,
    option_formatter,
    refuses_system_role,
    suggest_setting,
)
from train.llm.request import NO_LIMIT, Decoding, Request
from train.llm.request_body import request_body
from train.llm.system_role import merge_into_user

OPENAIS = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
NESTED = '{"error": {"message": "' + OPENAIS + '", "param": "max_tokens", "code": "unsupported_parameter"}}'
SYSTEM = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


def wrapped(message: str) -> Reply:
    """Return an error as LiteLLM's proxy forwards it."""
    received = "Received Model Group=m\nAvailable Model Group Fallbacks=None"
    return error(400, f"litellm.BadRequestError: OpenAIException - {message}. {received}", code="400")


def forbidden(field: str) -> Reply:
    """Return an error of pydantic, as Mistral's server sends it."""
    detail = {"type": "extra_forbidden", "loc": ["body", field], "msg": "Extra inputs are not permitted", "input": 1}
    return Reply(422, {"detail": [detail]})


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, OPENAIS, param="max_tokens", code="unsupported_parameter"),
        wrapped(OPENAIS),
        error(400, "Provider returned error", code=400, metadata={"raw": NESTED, "provider_name": "Azure"}),
        error(500, "this model is not supported MaxTokens, please use MaxCompletionTokens", code="bad_response"),
        forbidden("max_tokens"),
        Reply(500, {"detail": f"Error executing transformation: Error code: 400 - {NESTED}"}),
    ],
)
def test_the_token_limit_goes_by_the_name_that_an_error_asks_for(tmp_path: Path, refusal: Reply) -> None:
    async def script(asked: Asked) -> Reply:
        return refusal if "max_tokens" in asked.body else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        assert [(await client.ask(about(name))).text for name in ("a", "b")] == ["re: a", "re: b"]
        assert [request.body.get("max_completion_tokens") for request in servers[0].asked] == [None, 50, 50]
        assert client.counts.retries == 0

    run(script, work, tmp_path)


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 50. This model's maximum context length is 16 tokens.",
        "max_tokens is too large: 50. This model supports at most 16 completion tokens, whereas you provided 50.",
        "This model's maximum context length is 16 tokens. Please reduce the length of the messages or completion.",
        "Unsupported parameter: 'top_p' is not supported with this model.",
    ],
)
def test_a_limit_that_is_too_large_keeps_its_name(tmp_path: Path, message: str) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, message)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(RequestFailed, match="400"):
            await client.ask(about("a"))
        assert [request.body["max_tokens"] for request in servers[0].asked] == [50]

    run(script, work, tmp_path)


@pytest.mark.parametrize(
    ("extra", "sent", "limit"),
    [
        ({}, {"max_tokens": 50}, 50),
        ({"max_tokens": None, "max_completion_tokens": 4096}, {"max_completion_tokens": 4096}, 4096),
        ({"max_completion_tokens": 4096}, {"max_completion_tokens": 4096}, 4096),
        ({"max_tokens": None}, {}, NO_LIMIT),
        ({"max_completion_tokens": None}, {"max_tokens": 50}, 50),
    ],
)
def test_extra_renames_the_limit_and_the_journal_finds_the_same_answers(
    extra: dict[str, Any], sent: dict[str, Any], limit: int
) -> None:
    plain, changed = (Decoding.from_settings(50, 0.5, seed=3, extra=fields) for fields in ({}, extra))
    requests = [Request("stage", SYSTEM, decoding) for decoding in (plain, changed)]
    body = request_body("m", requests[1])
    assert body == {"model": "m", "messages": SYSTEM, "temperature": 0.5, "seed": 3} | sent
    key_fields = [1, "stage", "m", 0, {"temperature": 0.5, "seed": 3}, SYSTEM]  # as the first journals were written
    key = hashlib.blake2b(json.dumps(key_fields, sort_keys=True).encode(), digest_size=20).digest()
    assert requests[0].key("m") == requests[1].key("m") == key
    assert changed.max_tokens == limit


def test_without_a_limit_only_cut_answers_are_asked_again(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        limited = "max_tokens" in asked.body
        return chat_reply(f"{asked.prompt} {limited}", "length" if limited and asked.prompt == "long" else "stop")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        none = Decoding.from_settings(50, 0.5, extra={"max_tokens": None})
        for prompt in ("long", "short"):
            await client.ask(about(prompt))
        texts = [(await client.ask(about(prompt, decoding=none))).text for prompt in ("long", "short")]
        assert texts == ["long False", "short True"]
        assert (await client.ask(about("long"))).text == "long False"  # it was complete within the limit

    run(script, work, tmp_path)


def test_null_in_extra_removes_a_field_and_a_value_fills_a_null() -> None:
    nulls = {"temperature": None, "top_p": None, "seed": None, "top_k": None}
    given = {"temperature": 1, "reasoning_effort": "low"}
    assert Decoding.from_settings(9, 0.5, 0.9, 3, nulls) == Decoding(9)
    assert Decoding.from_settings(9, extra=given).parameters(2) == given
    # Answers from before nulls existed are found by the same key.
    assert Decoding.from_settings(9, 0.5, 0.9, 3, {"top_k": 5}) == Decoding(9, 0.5, 0.9, 3, extra={"top_k": 5})


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        # OpenAI's o and gpt-5 models; param alone decides, whatever else the message names.
        (
            error(
                400,
                "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
                "supported. (top_p is ignored.)",
                param="temperature",
                code="unsupported_value",
            ),
            "Leave it out: `answer.temperature: null`.",
        ),
        (
            error(400, "Unknown parameter: 'repetition_penalty'.", param="repetition_penalty"),
            "Leave it out: `answer.extra: {repetition_penalty: null}`.",
        ),
        (forbidden("seed"), "Leave it out: `answer.seed: null`."),
        (
            wrapped('{"type":"error","error":{"message":"temperature and top_p cannot both be specified"}}'),
            "Leave out one of them: `answer.temperature: null` or `answer.top_p: null`.",
        ),
        (error(400, "`temperature` is deprecated for this model"), "Leave it out: `answer.temperature: null`."),
        (
            wrapped("litellm.UnsupportedParamsError: m does not support parameters: ['seed', 'top_p'], for model=m"),
            "Leave out `answer.top_p: null`, `answer.seed: null`.",
        ),
        # Groq, xAI (whose `error` is text, in camel case)
        (error(400, "property 'seed' is unsupported"), "Leave it out: `answer.seed: null`."),
        (
            Reply(400, {"code": "Client specified an invalid argument", "error": "Argument not supported: topP"}),
            "Leave it out: `answer.top_p: null`.",
        ),
        (
            error(400, "Unrecognized request argument supplied: repetition_penalty"),
            "Leave it out: `answer.extra: {repetition_penalty: null}`.",
        ),
        (
            error(400, "Unrecognized request argument supplied: max_completion_tokens"),
            "Send the token limit as max_tokens, or none: `answer.extra: {max_tokens: null}`.",
        ),
        # Errors about something else
        (error(400, "max_completion_tokens is too large: 50. This model supports at most 16 completion tokens."), ""),
        (error(400, "This model's maximum context length is 9 tokens. temperature must ..."), ""),
        (error(400, "the prompt is empty"), ""),
        (Reply(400, b"<html>400 Bad Request</html>"), ""),
    ],
)
def test_a_refused_parameter_is_named_by_its_setting(refusal: Reply, advice: str) -> None:
    limit_name = "max_completion_tokens" if "max_completion_tokens" in str(refusal.body) else "max_tokens"
    decoding = Decoding(50, 0.7, 0.9, 3, extra={"repetition_penalty": 1.03}, limit_name=limit_name)
    body = request_body("m", Request("answer", SYSTEM, decoding))
    content = refusal.body if isinstance(refusal.body, dict) else None
    inner = content.get("error", content) if content else None  # as the openai package forwards it
    text = extract_error_text(inner, str(refusal.body))
    assert suggest_setting(inner, text, body, "answer", format_config_key) == advice


def test_options_are_formatted_as_typed() -> None:
    name = option_formatter(("temperature", "top_p"), "judge-")
    assert name("judge, run 1", "top_p", "null") == "--judge-top-p null"
    assert name("judge, run 1", "max_completion_tokens", "90") == """--judge-extra '{"max_completion_tokens": 90}'"""
    assert option_formatter(())("x", "enable_thinking", "false") == """--extra '{"enable_thinking": false}'"""
    assert option_formatter(())("x", "system_role", "merge_into_user") == "--system-role merge_into_user"


NO_SYSTEM_ROLE = [
    "System role not supported",
    "system role is not supported",
    "Conversation roles must alternate user/assistant/user/assistant/...",
    "Only user and assistant roles are supported!",
    "Only user, assistant and tool roles are supported, got system. at row 37, column 92:",
    "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    "Developer instruction is not enabled for models/gemma-3-27b-it",
    "This model doesn't support system messages. Try again without a system message or use a model that supports them.",
    "System messages are not allowed",
    "Invalid role: system",
    "messages[0].role must be one of: user, assistant",
]


@pytest.mark.parametrize("text", NO_SYSTEM_ROLE)
def test_a_refused_system_role_is_recognised(text: str) -> None:
    assert refuses_system_role(text, SYSTEM)
    assert not refuses_system_role(text, SYSTEM[1:])


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("Conversation roles must alternate user/assistant/user/assistant/...", [*SYSTEM, SYSTEM[1]]),
        ("After the optional system message, conversation roles must alternate user/assistant", SYSTEM),
        ("This model's maximum context length is 16 tokens. Your system message has 20.", SYSTEM),
        ("The system is overloaded, try again", SYSTEM),
        ("messages[1].role must be one of: system, user, assistant", SYSTEM),
    ],
)
def test_other_messages_about_systems_are_no_refusal_of_the_role(text: str, messages: list[dict[str, str]]) -> None:
    assert not refuses_system_role(text, messages)


def test_a_system_message_goes_into_the_first_user_turn() -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    assert merge_into_user(SYSTEM) == [{"role": "user", "content": "S\n\nU"}]
    assert merge_into_user([SYSTEM[0], greeting, SYSTEM[1]]) == [greeting, {"role": "user", "content": "S\n\nU"}]
    assert merge_into_user([SYSTEM[0], greeting]) == [{"role": "user", "content": "S"}, greeting]
    assert merge_into_user([{"role": "system", "content": " "}, SYSTEM[1]]) == [SYSTEM[1]]
    assert SYSTEM[1]["content"] == "U"


@pytest.mark.parametrize(
    ("status", "message", "changes", "advice"),
    [
        (
            400,
            "`top_p` is not supported",
            {"decoding": replace(LIMIT, top_p=0.9)},
            "Leave it out: `stage.top_p: null`.",
        ),
        (500, NO_SYSTEM_ROLE[0], {"messages": SYSTEM}, "set `system_role: merge_into_user`."),
    ],
)
def test_a_stage_whose_requests_are_all_refused_ends_with_the_setting(
    tmp_path: Path, status: int, message: str, changes: dict[str, Any], advice: str
) -> None:
    async def script(asked: Asked) -> Reply:
        return error(status, message)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        for number in range(20):
            request = about(f"{number}", **changes)
            with pytest.raises((RequestFailed, UserError)) as failure:
                await client.ask(replace(request, sample=number))
            if isinstance(failure.value, UserError):
                break
        assert isinstance(failure.value, UserError)
        assert message in str(failure.value)
        assert advice in str(failure.value)

    run(script, work, tmp_path)


def test_a_thinking_model_is_streamed_or_its_setting_is_named(tmp_path: Path) -> None:
    text = "parameter.enable_thinking must be set to false for non-streaming calls"

    def script(streams: bool) -> Callable[[Asked], Any]:
        async def answer(asked: Asked) -> Reply:
            return chat_reply("fine") if streams and asked.body.get("stream") else error(400, text)

        return answer

    async def works(client: Client, servers: list[ScriptedServer]) -> None:
        assert (await client.ask(about("a"))).text == "fine"
        assert [request.body.get("stream") for request in servers[0].asked] == [None, True]

    async def fails(client: Client, servers: list[ScriptedServer]) -> None:
        with pytest.raises(RequestFailed) as failure:
            await client.ask(about("b"))
        assert failure.value.advice == "Turn off its thinking: `stage.extra: {enable_thinking: false}`."
        assert len(servers[0].asked) == 2

    run(script(True), works, tmp_path)
    run(script(False), fails, tmp_path)
