"""Error responses: their meaning by status and message, errors in 200s, denials in mid-run, too long requests."""

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from client_runs import about, echo, first, run
from scripted_server import Asked, Reply, Script, ScriptedServer, error

from train.errors import UserError
from train.llm.client import Client
from train.llm.failure_policy import DENIALS, FAILURES_OF_STAGE
from train.llm.failures import RequestFailed
from train.llm.ordered_map import map_ordered
from train.llm.request import Answer
from train.llm.server_errors import ServerError, classify_error, is_about_length, parse_error, parse_error_body


def meaning(status: int, body: Any, headers: dict[str, str] | None = None) -> ServerError:
    text = json.dumps(body)
    result = parse_error(body, text) if status == 200 else parse_error_body(body, text)
    assert result is not None
    return classify_error(
        result.implied_status() if status == 200 else status, result.message, result, headers or {}, longest_wait=86_400
    )


IN_200 = {
    "OpenRouter": (
        {"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-day"}},
        "rate_limited",
        429,
    ),
    "a code as a string": ({"error": {"code": "503", "message": "No instances"}}, "rate_limited", 503),
    "vLLM": ({"object": "error", "message": "oops", "type": "InternalServerError", "code": 500}, "retryable", 500),
    "OpenAI": ({"error": {"message": "Slow down", "type": "x", "code": "rate_limit_exceeded"}}, "rate_limited", 429),
    "Anthropic": (
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        "rate_limited",
        503,
    ),
    "Gemini": ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], "rate_limited", 503),
    "a string": ({"error": "model 'm' not found"}, "denied", 404),
    "LM Studio at a wrong path": ({"error": "Unexpected endpoint or method. (POST /chat)"}, "denied", 404),
    "FastAPI": ({"detail": "Too many requests"}, "rate_limited", 429),
    "a status alone": ({"status": 503}, "rate_limited", 503),
    "AWS's gateway": ({"statusCode": 502, "message": "bad gateway"}, "unreachable", 502),
    "empty choices": ({"choices": [], "error": {"code": 502, "message": "Provider error"}}, "unreachable", 502),
    "null choices": ({"choices": None, "error": {"type": "server_error", "message": "oh"}}, "retryable", 500),
    "MiniMax": ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}, "choices": None}, "rate_limited", 429),
    "MiniMax's credit": ({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}, "fatal", 402),
    "a wrong key": ({"error": {"message": "no", "code": "invalid_api_key"}}, "denied", 401),
    "no credit": ({"error": {"message": "Insufficient credits", "code": 402}}, "fatal", 402),
    "too long": ({"error": {"message": "too long", "code": "context_length_exceeded"}}, "request", 400),
    "flagged": ({"error": {"message": "Your input was flagged", "code": 403}}, "request", 403),
    "no words of any kind": ({"error": {"message": "upstream"}}, "retryable", 200),
}


@pytest.mark.parametrize(("body", "kind", "status"), IN_200.values(), ids=IN_200)
def test_an_error_in_a_200_has_the_status_that_it_names_or_implies(body: Any, kind: str, status: int) -> None:
    result = meaning(200, body)
    assert (result.kind, result.status) == (kind, status)


@pytest.mark.parametrize("body", [{}, {"choices": []}, [], "hello", None, {"error": {}}, {"error": None, "id": "x"}])
def test_a_body_without_an_error_gives_none(body: Any) -> None:
    assert parse_error(body, json.dumps(body)) is None


EXHAUSTED = {
    "OpenAI": (429, {"error": {"message": "You exceeded your current quota, please check your plan and billing."}}),
    "OpenAI's code": (429, {"error": {"message": "no", "code": "insufficient_quota"}}),
    "OpenRouter's key": (403, {"error": {"message": "Key limit exceeded (total limit).", "code": 403}}),
    "Anthropic": (400, {"error": {"message": "Your credit balance is too low to access the Anthropic API."}}),
    "DeepSeek": (402, {"error": {"message": "Insufficient Balance"}}),
    "Moonshot": (429, {"error": {"message": "suspended", "type": "exceeded_current_quota_error"}}),
    "xAI": (403, {"error": "Your team has either used all available credits or reached its monthly spending limit."}),
    "LiteLLM": (400, {"error": {"message": "Budget has been exceeded! Current cost: 2", "type": "budget_exceeded"}}),
    "SiliconFlow": (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    "Zhipu": (429, {"error": {"code": "1113", "message": "余额不足或无可用资源包"}}),
    "DashScope": (400, {"error": {"code": "Arrearage", "message": "Access denied"}}),
    "Gemini's day": (
        429,
        [
            {
                "error": {
                    "code": 429,
                    "message": "Quota exceeded. Please retry in 34s.",
                    "details": [{"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}],
                }
            }
        ],
    ),
    "Gemini without any": (429, [{"error": {"message": "exceeded your current quota, limit: 0, Please retry in 17s."}}]),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body"), EXHAUSTED.values(), ids=EXHAUSTED)
def test_used_up_credit_or_quota_is_fatal(status: int, body: Any) -> None:
    result = meaning(status, body)
    assert (result.kind, result.status) == ("fatal", 402)


PASSING = {
    "OpenAI": "Rate limit reached for m on tokens per min (TPM): Limit 1. Add a payment method at .../account/billing.",
    "Azure": "Requests have exceeded token rate limit of your current OpenAI S0 pricing tier. See aka.ms/oai/quotaincrease",
    "Groq": "Rate limit reached for model m on tokens per day (TPD): Limit 9. Please try again in 7m12s.",
    "Vertex": "Quota exceeded for aiplatform.googleapis.com/generate_content_requests_per_minute_per_project.",
    "Gemini": "Resource has been exhausted (e.g. check quota).",
}


@pytest.mark.parametrize("message", PASSING.values(), ids=PASSING)
def test_a_limit_that_resets_is_a_rate_limit(message: str) -> None:
    assert meaning(429, {"error": {"message": message, "code": 429}}).kind == "rate_limited"


def test_a_quota_with_a_retry_after_is_a_rate_limit() -> None:
    assert meaning(429, {"error": {"message": "Quota exceeded."}}, {"retry-after": "3600"}).retry_after == 3600


TOO_LONG = {
    "vLLM": (400, "This model's maximum context length is 4096 tokens. However, you requested 4203 tokens"),
    "vLLM's prompt": (400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096."),
    "SGLang": (400, "The input (61709 tokens) is longer than the model's context length (40960 tokens)."),
    "TGI": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000"),
    "llama.cpp": (400, "request (10431 tokens) exceeds the available context size (4096 tokens), try increasing it"),
    "llama.cpp's batch": (500, "input is too large to process. increase the physical batch size"),
    "llama-cpp-python": (400, "Requested tokens (817) exceed context window of 512"),
    "Anthropic": (400, "prompt is too long: 204808 tokens > 200000 maximum"),
    "Gemini": (400, "The input token count (1200000) exceeds the maximum number of tokens allowed (1048575)."),
    "Mistral": (400, "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context"),
    "Bedrock": (400, "Input is too long for requested model."),
    "xAI": (400, "This model's maximum prompt length is 131072 but the request contains 537812 tokens."),
    "Cohere": (400, "too many tokens: total number of tokens in the prompt cannot exceed 4081"),
    "DashScope": (400, "Range of input length should be [1, 30720]"),
    "Zhipu": (400, "Prompt exceeds max length"),
    "nginx": (413, "<html><h1>413 Request Entity Too Large</h1></html>"),
}


@pytest.mark.parametrize(("status", "message"), TOO_LONG.values(), ids=TOO_LONG)
def test_a_request_that_is_too_long_fails_alone(status: int, message: str) -> None:
    result = meaning(status, {"error": {"message": message}})
    assert (result.kind, result.about_content) == ("request", True)


@pytest.mark.parametrize(
    ("message", "is_bytes"),
    [
        ("<html><title>413 Request Entity Too Large</title><center>nginx</center></html>", True),
        ({"error": {"type": "request_too_large", "message": "Request exceeds the maximum size"}}, True),
        ({"message": "request entity too large", "type": "entity.too.large"}, True),
        ("Payload Too Large", True),
        ("", True),
        ({"error": {"message": "Request too large for model `m` on tokens per minute (TPM): Limit 6000"}}, False),
        ({"error": {"message": "Input validation error: `inputs` must have less than 512 tokens. Given: 700"}}, False),
    ],
)
def test_a_limit_in_bytes_is_not_the_context(message: Any, is_bytes: bool) -> None:
    body = message if isinstance(message, dict) else None
    error = parse_error_body(body, json.dumps(body) if body else message)
    result = classify_error(413, "413 Request Entity Too Large", error, {}, longest_wait=1)
    assert (result.kind, result.about_content) == ("request", True)
    assert bool(result.advice and "limit in bytes" in result.advice) == is_bytes
    assert not is_about_length(result.message)  # or the last line of a run would blame the model's context


@pytest.mark.parametrize(
    "message",
    [
        "top_k is no parameter",
        "max_tokens: 8192 > 4096, which is the maximum allowed number of output tokens",
        "'temperature' does not support 0.7 with this model",
        "[{'type': 'extra_forbidden', 'msg': 'Extra inputs are not permitted', 'input': 'the context length'}]",
        "System role not supported",
    ],
)
def test_other_errors_of_a_request_are_not_about_its_length(message: str) -> None:
    result = meaning(400, {"error": {"message": message}})
    assert (result.kind, result.about_content) == ("request", False)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (403, {"message": "requires moderation. Your input was flagged"}),
        (400, {"message": "The response was filtered", "code": "content_filter"}),
        (400, {"message": "Input data may contain inappropriate content.", "code": "data_inspection_failed"}),
    ],
)
def test_a_filtered_request_fails_alone(status: int, error: dict[str, str]) -> None:
    result = meaning(status, {"error": error})
    assert (result.kind, result.about_content) == ("request", True)


@pytest.mark.parametrize(
    ("status", "body", "kind", "meant"),
    [
        (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}], "denied", 401),
        (400, [{"error": {"code": 400, "message": "API key expired. Please renew the API key."}}], "denied", 401),
        (500, {"error": {"code": "429", "message": "litellm.RateLimitError"}}, "rate_limited", 429),
        (403, {"error": {"message": 'requires moderation. Your input was flagged for "violence"'}}, "request", 403),
        (403, {"error": {"message": "forbidden"}}, "denied", 403),
        (502, "<html><head><title>502 Bad Gateway</title></head></html>", "unreachable", 502),
    ],
)
def test_the_body_can_override_the_status(status: int, body: Any, kind: str, meant: int) -> None:
    result = meaning(status, body)
    assert (result.kind, result.status) == (kind, meant)


async def ask_each(client: Client, prompts: Sequence[str]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(client.ask(about(prompt)) for prompt in prompts), return_exceptions=True)


def answers(results: Sequence[Answer | BaseException]) -> list[str | None]:
    return [entry.text if isinstance(entry, Answer) else None for entry in results]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, {"error": {"code": 429, "message": "Provider returned error"}}),
        Reply(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}], "error": {"code": 429}}),
        Reply(200, {"error": {"type": "overloaded_error", "message": "Overloaded"}}),
        Reply(200, {"choices": [{"message": {"content": "Wat"}, "finish_reason": "error", "error": {"code": 429}}]}),
        Reply(200, {"status": 503}),
    ],
)
def test_a_rate_limit_in_a_200_is_retried_without_a_limit(tmp_path: Path, reply: Reply) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> tuple[str, int]:
        return (await client.ask(about("hi"))).text, len(servers[0].asked)

    assert run(first(*[reply] * 30), work, tmp_path) == ("re: hi", 31)


def test_used_up_credit_in_a_200_ends_the_run_with_its_message(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return Reply(200, {"error": {"message": "Insufficient credits", "code": 402}})

    async def work(client: Client, servers: list[ScriptedServer]) -> str:
        with pytest.raises(UserError) as failure:
            await client.ask(about("hi"))
        assert len(servers[0].asked) == 1
        return str(failure.value)

    message = run(script, work, tmp_path)
    assert "402 in the body of a 200: Insufficient credits. Add credit" in message
    assert "start the same command again" in message


def after(count: int, reply: Reply, until: int | None = None) -> Script:
    """A script that answers a number of requests, and then sends a reply, up to another number if given."""

    async def script(asked: Asked) -> Reply:
        return await echo(asked) if asked.number < count or asked.number >= (until or 1e9) else reply

    return script


DENIED = {
    "an expired key": error(401, "Access token expired"),
    "forbidden": error(403, "no access to this resource"),
    "an ingress": Reply(404, b"404 page not found\n"),
    "a wrong method": Reply(405, b""),
    "Gemini's key": error(400, "API key expired. Please renew the API key."),
}


@pytest.mark.parametrize("reply", DENIED.values(), ids=DENIED)
def test_temporary_denials_lose_nothing(tmp_path: Path, reply: Reply) -> None:
    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        prompts = [f"{number}" for number in range(40)]
        assert answers(await ask_each(client, prompts)) == [f"re: {prompt}" for prompt in prompts]
        assert client.counts.failed == 0

    run(after(20, reply, until=30), work, tmp_path, concurrency=4)


@pytest.mark.parametrize("name", ["an expired key", "forbidden", "Gemini's key", "an ingress"])
def test_denials_in_a_row_end_the_run_and_lose_no_row(tmp_path: Path, name: str) -> None:
    prompts = [f"{number}" for number in range(40)]

    async def denied(client: Client, servers: list[ScriptedServer]) -> None:
        result = await ask_each(client, prompts[:20])
        assert None not in answers(result)
        result = await ask_each(client, prompts)
        assert answers(result)[:20] == [f"re: {prompt}" for prompt in prompts[:20]]
        assert {type(entry) for entry in result[20:]} == {UserError}
        assert len(servers[0].asked) >= 20 + DENIALS
        for entry in result[20:]:
            assert re.search(
                r"It answered other.*start the same command again, and it continues from there", str(entry)
            )

    async def healthy(client: Client, servers: list[ScriptedServer]) -> list[str | None]:
        result = answers(await ask_each(client, prompts))
        assert len(servers[0].asked) == 20
        return result

    run(after(20, DENIED[name]), denied, tmp_path, longest_absence=0.1)
    assert run(echo, healthy, tmp_path) == [f"re: {prompt}" for prompt in prompts]


def test_rows_forbidden_for_their_content_fail_alone(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(403, "not for you") if asked.prompt.startswith("rude") else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        prompts = [f"rude {number}" if number % 10 == 5 else f"{number}" for number in range(100)]
        result = await ask_each(client, prompts)
        for prompt, entry in zip(prompts, result, strict=True):
            assert isinstance(entry, RequestFailed if "rude" in prompt else Answer), (prompt, entry)

    run(script, work, tmp_path, concurrency=4)


def test_forbidden_rows_left_by_an_earlier_run_fail_alone(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(403, "not for you") if asked.prompt == "rude" else await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        [good, rude] = await ask_each(client, ["good", "rude"])
        assert isinstance(good, Answer)
        assert isinstance(rude, RequestFailed)

    run(script, work, tmp_path)
    run(script, work, tmp_path)  # the good one is in the journal, so only the rude one is asked


def test_early_failures_do_not_end_a_stage_with_slower_answers(tmp_path: Path) -> None:
    failed: list[str] = []

    async def script(asked: Asked) -> Reply:
        if asked.prompt.startswith("bad"):
            failed.append(asked.prompt)
            return error(400, "I don't like it")
        while len(failed) < 3 * FAILURES_OF_STAGE:  # the answers come after all of these
            await asyncio.sleep(0.001)
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        prompts = [f"good {number}" for number in range(4)]
        prompts += [f"bad {number}" for number in range(3 * FAILURES_OF_STAGE)]
        assert answers(await ask_each(client, prompts)) == [
            f"re: {prompt}" if "good" in prompt else None for prompt in prompts
        ]
        assert client.counts.failed == 3 * FAILURES_OF_STAGE

    run(script, work, tmp_path, concurrency=8)


def test_a_stage_whose_requests_all_fail_ends_the_run_early(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        return error(400, "top_k is no parameter")

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        async def lose(number: int) -> None:
            with suppress(RequestFailed):
                await client.ask(about(f"{number}"))

        async def lose_all() -> None:
            async with aclosing(map_ordered(range(5_000), lose, at_once=16)) as rows:
                async for _ in rows:
                    pass

        with pytest.raises(UserError, match=r"^stage stage: none of the first \d+ requests got an answer.*top_k"):
            await lose_all()
        assert len(servers[0].asked) < 100

    run(script, work, tmp_path)


def test_any_number_of_requests_that_are_too_long_come_before_the_first_answer(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.prompt.startswith("long"):
            return error(400, "the request exceeds the available context size", type="exceed_context_size_error")
        return await echo(asked)

    async def work(client: Client, servers: list[ScriptedServer]) -> None:
        result = await ask_each(client, [f"long {number}" for number in range(5 * FAILURES_OF_STAGE)])
        assert {type(entry) for entry in result} == {RequestFailed}
        assert client.server_messages() == ["stage stage: no answer so far, 100 refused as too long or by a filter"]
        assert (await client.ask(about("short"))).text == "re: short"
        assert client.server_messages() == []

    run(script, work, tmp_path)


PROMPT = 'the whole of a long prompt (with [brackets], "quotes" and it\'s own marks) ' * 40
FAULT = {"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted", "input": PROMPT}
OTHER = {"type": "missing", "loc": ["body", "messages", 0, "role"], "msg": "Field required", "input": {"text": PROMPT}}
AS_PYTHON = str([{**FAULT, "loc": ("body", "top_k")}, {**OTHER, "loc": ("body", "messages", 0, "role")}])
TOLD = "body.top_k: Extra inputs are not permitted"
VALIDATION = {
    "FastAPI": ({"detail": [FAULT]}, TOLD),
    "two": ({"detail": [FAULT, OTHER]}, f"{TOLD}; body.messages.0.role: Field required"),
    "many": ({"detail": [FAULT] * 5}, f"{TOLD}; {TOLD}; {TOLD} (and 2 more)"),
    "vLLM": (
        {"error": {"message": AS_PYTHON, "type": "Bad Request", "code": 400}},
        f"{TOLD}; body.messages.0.role: Field required",
    ),
    "vLLM before 0.9": ({"object": "error", "message": AS_PYTHON, "code": 400}, f"{TOLD}; body.messages.0.role"),
    "Mistral": ({"object": "error", "message": {"detail": [FAULT]}, "type": "invalid_request_error"}, TOLD),
    "errors": ({"errors": [OTHER]}, "body.messages.0.role: Field required"),
    "JSON in a message": ({"error": {"message": f"bad request: {json.dumps([FAULT])}"}}, TOLD),
    "pydantic's own text": (
        {"detail": "1 validation error for Chat\ntop_k\n  Extra inputs are not permitted [type=extra_forbidden, "
         f"input_value={PROMPT[:40]!r}, input_type=str]\n    For further information visit https://errors.pydantic.dev"},
        "1 validation error for Chat\ntop_k\n  Extra inputs are not permitted [type=extra_forbidden]",
    ),
    "no known form": ({"reason": {"why": "top_k"}, "input": PROMPT}, '{"reason": {"why": "top_k"}}'),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), VALIDATION.values(), ids=VALIDATION)
def test_validation_errors_show_the_field_and_not_the_prompt(body: Any, expected: str) -> None:
    message = parse_error_body(body, json.dumps(body)).message
    assert message.startswith(expected)
    assert "long prompt" not in message
    assert "'type'" not in message
