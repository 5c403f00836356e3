"""Startup check: small requests to each server, before work that depends on it.

A run needs none: its first request is the first contact, and a run that finds all answers in its journal asks nothing.
`--check` makes it, and so does the bench with the judge's servers, before the model answers for hours.

1. The list of models, for error messages. No name is refused by it: servers accept names that they don't list
   (adapters, routers, aliases), and some have no list.
2. A request for one token with the sampling parameters of each stage, since a server may refuse some of them. Stages
   with the same parameters share a request.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from train.errors import UserError
from train.formatting import duration
from train.llm.concurrency import Backoff
from train.llm.connection.errors import speaks_tls, tls_expected
from train.llm.diagnosis import describe, describe_unreachable, explain, list_names
from train.llm.refusals import SettingFormatter, format_config_key, names_field
from train.llm.request import Answer, Decoding, Request
from train.llm.server import LONGEST_START_PAUSE, SILENT, Server, ServerConnection, share_secrets
from train.llm.server_errors import ServerError
from train.progress import SECONDS_BETWEEN_LINES

ANSWER_SECONDS = 120.0
"""Longest wait for one token: a server may load a model first, or work off a queue."""
SILENT_ANSWER_SECONDS = 30.0
"""Longest wait for one token from a server that did not answer the request for its models."""
TRIES = 3
"""Tries of a request that fails: a gateway may have one faulty server among several."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_ONE_TOKEN = {"first contact": Decoding(max_tokens=1)}


async def check_servers(
    servers: Sequence[Server],
    model: str,
    *,
    wait: float = 0.0,
    backoff: Backoff | None = None,
    stages: Mapping[str, Decoding] = _ONE_TOKEN,
    format_setting: SettingFormatter = format_config_key,
) -> None:
    """Ask each server, and print its state. `stages`: the decoding of each stage of the run.

    Raises UserError if a server refuses the key or a sampling parameter, doesn't know the model or the path, or fails
    at TLS; and if none can be reached for `wait` seconds. One of several that can't be reached is a warning.
    """
    connections = [
        ServerConnection(server, backoff or Backoff(), patience=float("inf"), format_setting=format_setting)
        for server in servers
    ]
    requests = _distinct_requests(stages)
    share_secrets(connections)
    try:
        results = await asyncio.gather(*(_contact(server, model, requests, wait) for server in connections))
        errors = [result for result in results if isinstance(result, ServerError)]
        if len(errors) == len(results):
            raise UserError(describe_unreachable(connections[0], errors[0]))
        for server, result in zip(connections, results, strict=True):
            if isinstance(result, ServerError):
                print(f"warning: {describe_unreachable(server, result)}", file=sys.stderr)
            else:
                print(f"{server.name} {result}", flush=True)
    finally:
        for server in connections:
            await server.endpoint.api.close()


def _distinct_requests(stages: Mapping[str, Decoding]) -> list[Request]:
    """Return a small request for each distinct set of sampling parameters, of the first stage that has it."""
    requests: dict[str, Request] = {}
    for stage, decoding in stages.items():
        parameters = f"{decoding.limit_name} {json.dumps(decoding.parameters(0), sort_keys=True)}"
        requests.setdefault(parameters, Request(stage, [{"role": "user", "content": "Hi"}], decoding))
    return list(requests.values())


async def _contact(server: ServerConnection, model: str, requests: Sequence[Request], wait: float) -> str | ServerError:
    """Return the server's state as text, or its error if it can't be reached. Raises UserError."""
    address = server.endpoint.address
    started = printed_at = time.monotonic()
    failures = 0
    while True:
        names = await server.endpoint.list_models()
        is_silent = not server.endpoint.reached
        for request in requests:
            result = await _ask_one_token(
                server, model, request, SILENT_ANSWER_SECONDS if is_silent else ANSWER_SECONDS
            )
            if not isinstance(result, Answer):
                break
        if result is None and is_silent and await server.endpoint.probe() is None:
            result = SILENT
        if isinstance(result, ServerError) and result.kind in ("retryable", "dropped") and not result.status:
            result = tls_expected(address) if await speaks_tls(address) else result
        kinds = ("unreachable", "dropped") if is_silent else ("unreachable",)
        if not (isinstance(result, ServerError) and result.kind in kinds):
            return await _judge(server, model, names, result)
        remaining = started + wait - time.monotonic()
        if remaining <= 0:
            return result
        if not failures or time.monotonic() - printed_at > SECONDS_BETWEEN_LINES:
            printed_at = time.monotonic()
            print(f"{server.name}: {result.message}; waiting up to {duration(remaining)} for it", flush=True)
        failures += 1
        await asyncio.sleep(min(server.backoff.delay(failures), LONGEST_START_PAUSE, remaining))


async def _ask_one_token(
    server: ServerConnection, model: str, request: Request, seconds: float
) -> Answer | ServerError | None:
    """Return the result of a request for one token; None if there is none in time.

    A parameter that conflicts only with this limit (min_tokens, a budget for reasoning) is tried with the stage's own.
    """
    small = replace(request, decoding=replace(request.decoding, max_tokens=1))
    try:
        async with asyncio.timeout(seconds):
            for tries in range(1, TRIES + 1):
                result = await server.send(model, small)
                if isinstance(result, Answer):
                    break
                if result.kind == "request" and _is_about_limit(result):
                    small = request
                elif result.kind in ("retryable", "dropped"):
                    await asyncio.sleep(server.backoff.delay(tries))
                elif result.kind != "resend":
                    break
            return result
    except TimeoutError:
        return None


def _is_about_limit(error: ServerError) -> bool:
    """Return True if the message names the token limit besides a refused setting."""
    return bool(error.advice) and any(names_field(error.message, name) for name in _LIMITS)


async def _judge(
    server: ServerConnection, model: str, names: list[str] | None, result: Answer | ServerError | None
) -> str:
    """Return the server's state as text. Raises UserError for a state that a run can't work with."""
    if result is None:
        return f"is reached, and has not answered within {duration(ANSWER_SECONDS)}: it may be loading or busy"
    if isinstance(result, Answer):
        return f"answers as {model}"
    if result.kind in ("fatal", "denied") or (result.kind == "request" and result.advice):
        raise UserError(await explain(server, model, result))
    if result.kind == "rate_limited":
        return f"is reached, and busy: {result.message}"
    if names is not None and model not in names and f"models/{model}" not in names:  # Gemini's form
        raise UserError(
            f"{server.name} answers {result.message.rstrip('.')}. It was asked for the model {model!r}; "
            f"{list_names(model, names)}."
        )
    if result.kind in ("request", "incomplete"):
        return f"is reached, and refuses a request for one token, which need not mean more: {result.message}"
    advice = (
        f"It lists {model!r}: see the server's own log."
        if names is not None
        else f"Is base_url right, and is {model!r} a model that it serves?"
    )
    raise UserError(f"{describe(server, result)} ({TRIES} times). {advice}")
