"""First contact: small requests to each server, before work that depends on it begins.

A run needs none of its own: its first request is the first contact, and a run that finds all in its journal asks
nothing. `--check` makes it, and so does the bench with the judge's servers before the model answers for hours.

1. The list of models, for the words of an error. It refuses no name: servers accept names that they don't list
   (adapters, routers, aliases), and some have no list.
2. A request for one token with the sampling parameters of each stage, as a server may refuse some of them. Stages with
   the same parameters share a request.
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
from train.llm.connection.diagnosis import about, explain, list_models, look, name_models
from train.llm.connection.errors import speaks_tls, tls_wanted
from train.llm.connection.redaction import Redactor
from train.llm.journal import Answer, Decoding, Request
from train.llm.refusals import SettingFormatter, format_config_key, names_field
from train.llm.server import PAUSE_OF_A_START, SILENT, Server, ServerConnection
from train.llm.server_errors import ServerError
from train.progress import SECONDS_BETWEEN_LINES

SECONDS_OF_AN_ANSWER = 120.0
"""Longest wait for one token. A server may load a model first, or work off a queue: that is no error."""
START_IT = (
    "Check host and port, and that the server is running. For one that is still starting, --wait-for-server 30m waits "
    "as long."
)
BEHIND_A_PORT = (
    "The port is open, and no model server answers behind it. See that the server is running, and that the port of a "
    "container or tunnel (docker, ssh -L, kubectl port-forward) leads to its own. For one that is still starting, "
    "--wait-for-server 30m waits as long."
)
SECONDS_OF_A_SILENT_ONE = 30.0
"""Longest wait for one token from a server that did not answer a look at its models."""
TRIES = 3
"""Of a request that fails: a gateway with several servers behind it may have one that is faulty."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_PLAIN = {"first contact": Decoding(max_tokens=1)}


async def check_servers(
    servers: Sequence[Server],
    model: str,
    *,
    wait: float = 0.0,
    backoff: Backoff | None = None,
    stages: Mapping[str, Decoding] = _PLAIN,
    format_setting: SettingFormatter = format_config_key,
) -> None:
    """Ask each server, and print what it is. `stages`: the stages of the run and how their answers are drawn.

    Raises UserError where one refuses the key or a sampling parameter, doesn't know the model or the path, or has a
    fault of TLS; and where none can be reached for `wait` seconds. One of several that can't be reached is a warning.
    """
    lanes = [
        ServerConnection(server, backoff or Backoff(), patience=float("inf"), format_setting=format_setting)
        for server in servers
    ]
    requests = _distinct(stages)
    share_secrets(lanes)
    try:
        outcomes = await asyncio.gather(*(_contact(lane, model, requests, wait) for lane in lanes))
        if all(isinstance(outcome, ServerError) for outcome in outcomes):
            [first, *_] = [outcome for outcome in outcomes if isinstance(outcome, ServerError)]
            raise UserError(unreachable(lanes[0], first))
        for lane, outcome in zip(lanes, outcomes, strict=True):
            if isinstance(outcome, ServerError):
                print(f"warning: {unreachable(lane, outcome)}", file=sys.stderr)
            else:
                print(f"{lane.name} {outcome}", flush=True)
    finally:
        for lane in lanes:
            await lane.api.close()


def _distinct(stages: Mapping[str, Decoding]) -> list[Request]:
    """Return a small request for each distinct set of sampling parameters, of the first stage that has it."""
    found: dict[str, Request] = {}
    for stage, decoding in stages.items():
        parameters = f"{decoding.limit_name} {json.dumps(decoding.parameters(0), sort_keys=True)}"
        found.setdefault(parameters, Request(stage, [{"role": "user", "content": "Hi"}], decoding))
    return list(found.values())


def share_secrets(lanes: Sequence[ServerConnection]) -> None:
    """Have every lane redact the secrets of all."""
    redactor = Redactor([secret for lane in lanes for secret in lane.secrets])
    for lane in lanes:
        lane.redactor = redactor


def unreachable(lane: ServerConnection, trouble: ServerError, waited: float = 0.0) -> str:
    """Return that a server can't be reached, why, and what to do."""
    proxy = lane.address.proxy
    advice = (
        f"See that the proxy is running, unset {proxy.variable}, or name the server's host in no_proxy."
        if proxy
        else BEHIND_A_PORT
        if trouble.kind == "dropped"
        else START_IT
    )
    tried = f", tried for {duration(waited)}" if waited >= 1 else ""
    return f"{about(lane, trouble)}{tried}. {trouble.advice or advice}"


async def _contact(lane: ServerConnection, model: str, requests: Sequence[Request], wait: float) -> str | ServerError:
    """Return in words what a server answers, or its trouble where it can't be reached. Raises UserError."""
    started = told = time.monotonic()
    failures = 0
    while True:
        names = await list_models(lane)
        is_silent = not lane.reached
        seconds = SECONDS_OF_A_SILENT_ONE if is_silent else SECONDS_OF_AN_ANSWER
        for request in requests:
            outcome = await _one_token(lane, model, request, seconds)
            if not isinstance(outcome, Answer):
                break
        if outcome is None and is_silent and await look(lane) is None:
            outcome = SILENT
        if not (isinstance(outcome, ServerError) and outcome.kind in (("gone", "dropped") if is_silent else ("gone",))):
            return await _judge(lane, model, names, outcome)
        if outcome.kind == "dropped" and await speaks_tls(lane.address):
            return await _judge(lane, model, names, tls_wanted(lane.address))
        left = started + wait - time.monotonic()
        if left <= 0:
            return outcome
        if not failures or time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(f"{lane.name}: {outcome.what}; waiting up to {duration(left)} for it", flush=True)
        failures += 1
        await asyncio.sleep(min(lane.backoff.after(failures), PAUSE_OF_A_START, left))


async def _one_token(
    lane: ServerConnection, model: str, request: Request, seconds: float
) -> Answer | ServerError | None:
    """Return the outcome of a request for one token; None where nothing comes in time.

    A parameter that contradicts this limit alone (min_tokens, a budget for reasoning) is tried with the stage's own.
    """
    small = replace(request, decoding=replace(request.decoding, max_tokens=1))
    try:
        async with asyncio.timeout(seconds):
            for tries in range(1, TRIES + 1):
                outcome = await lane.send(model, small)
                if isinstance(outcome, ServerError) and outcome.kind == "row" and _is_about_limit(outcome):
                    small = request
                    continue
                if not (isinstance(outcome, ServerError) and outcome.kind in ("again", "fault", "dropped")):
                    break
                if outcome.kind != "again":
                    await asyncio.sleep(lane.backoff.after(tries))
            return outcome
    except TimeoutError:
        return None


def _is_about_limit(trouble: ServerError) -> bool:
    """Return whether a refused setting was named beside the token limit."""
    return bool(trouble.advice) and any(names_field(trouble.what, name) for name in _LIMITS)


async def _judge(
    lane: ServerConnection, model: str, names: list[str] | None, outcome: Answer | ServerError | None
) -> str:
    if outcome is None:
        return f"is reached, and has not answered within {duration(SECONDS_OF_AN_ANSWER)}: it may be loading or busy"
    if (
        isinstance(outcome, ServerError)
        and outcome.kind in ("fault", "dropped")
        and not outcome.status
        and await speaks_tls(lane.address)
    ):
        outcome = tls_wanted(lane.address)
    if isinstance(outcome, Answer):
        return f"answers as {model}"
    if outcome.kind in ("hopeless", "denied") or (outcome.kind == "row" and outcome.advice):
        raise UserError(await explain(lane, model, outcome))
    if outcome.kind == "too much":
        return f"is reached, and busy: {outcome.what}"
    if names is not None and not _is_in(model, names):
        raise UserError(
            f"{lane.name} answers {outcome.what.rstrip('.')}. It was asked for the model {model!r}; "
            f"{name_models(model, names)}."
        )
    if outcome.kind in ("row", "broken"):
        return f"is reached, and refuses a request for one token, which need not mean more: {outcome.what}"
    advice = (
        f"It lists {model!r}, so look into the server's own log."
        if names is not None
        else f"Is base_url right, and is {model!r} a model that it serves?"
    )
    raise UserError(f"{about(lane, outcome)} ({TRIES} times). {advice}")


def _is_in(model: str, names: list[str]) -> bool:
    return model in names or f"models/{model}" in names  # Gemini lists its names so
