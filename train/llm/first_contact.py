"""First contact: one or two small requests to each server, before work that depends on it begins.

A run needs none of its own: its first request is the first contact, and a run that finds all in its journal asks
nothing. `--check` makes it, and so does the bench with the judge's servers before the model answers for hours.

1. The list of models. Where it names the model, and no key is sent that it might not have looked at, that is all.
2. A request for one token. The list alone refuses no name: servers accept names that they don't list (adapters,
   routers, aliases), and some have no list.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from train.errors import UserError
from train.llm.advice import about, explain, list_models, look, name_models
from train.llm.connection_faults import speaks_tls, tls_wanted
from train.llm.failures import Trouble
from train.llm.journal import Answer, Decoding, Request
from train.llm.places import Pauses
from train.llm.redaction import Redactor
from train.llm.refusals import NameSetting, config_setting
from train.llm.server import PAUSE_OF_A_START, SILENT, Server, ServerLane
from train.progress import SECONDS_BETWEEN_LINES, duration

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
_PLAIN = Decoding(max_tokens=1)


async def check_servers(
    servers: Sequence[Server],
    model: str,
    *,
    wait: float = 0.0,
    pauses: Pauses | None = None,
    decoding: Decoding = _PLAIN,
    name_setting: NameSetting = config_setting,
) -> None:
    """Ask each server, and print what it is. `decoding`: of the request for one token, so that a refusal shows early.

    Raises UserError where one refuses the key, doesn't know the model or the path, or has a fault of TLS; and where
    none can be reached for `wait` seconds. One of several that can't be reached is a warning.
    """
    lanes = [
        ServerLane(server, pauses or Pauses(), patience=float("inf"), name_setting=name_setting) for server in servers
    ]
    request = Request("first contact", [{"role": "user", "content": "Hi"}], replace(decoding, max_tokens=1))
    share_secrets(lanes)
    try:
        outcomes = await asyncio.gather(*(_contact(lane, model, request, wait) for lane in lanes))
        if all(isinstance(outcome, Trouble) for outcome in outcomes):
            [first, *_] = [outcome for outcome in outcomes if isinstance(outcome, Trouble)]
            raise UserError(unreachable(lanes[0], first))
        for lane, outcome in zip(lanes, outcomes, strict=True):
            if isinstance(outcome, Trouble):
                print(f"warning: {unreachable(lane, outcome)}", file=sys.stderr)
            else:
                print(f"{lane.name} {outcome}", flush=True)
    finally:
        for lane in lanes:
            await lane.api.close()


def share_secrets(lanes: Sequence[ServerLane]) -> None:
    """Have every lane redact the secrets of all."""
    redactor = Redactor([secret for lane in lanes for secret in lane.secrets])
    for lane in lanes:
        lane.redactor = redactor


def unreachable(lane: ServerLane, trouble: Trouble, waited: float = 0.0) -> str:
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


async def _contact(lane: ServerLane, model: str, request: Request, wait: float) -> str | Trouble:
    """Return in words what a server answers, or its trouble where it can't be reached. Raises UserError."""
    started = told = time.monotonic()
    failures = 0
    while True:
        names = await list_models(lane)
        if names is not None and lane.key is None and _is_in(model, names):
            return f"serves {model}"
        is_silent = not lane.reached
        outcome = await _one_token(lane, model, request, SECONDS_OF_A_SILENT_ONE if is_silent else SECONDS_OF_AN_ANSWER)
        if outcome is None and is_silent and await look(lane) is None:
            outcome = SILENT
        if not (isinstance(outcome, Trouble) and outcome.kind in (("gone", "dropped") if is_silent else ("gone",))):
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
        await asyncio.sleep(min(lane.pauses.after(failures), PAUSE_OF_A_START, left))


async def _one_token(lane: ServerLane, model: str, request: Request, seconds: float) -> Answer | Trouble | None:
    """Return what comes of a request for one token; None where nothing comes in time."""
    try:
        async with asyncio.timeout(seconds):
            for tries in range(1, TRIES + 1):
                outcome = await lane.send(model, request)
                if not (isinstance(outcome, Trouble) and outcome.kind in ("again", "fault", "dropped")):
                    break
                if outcome.kind != "again":
                    await asyncio.sleep(lane.pauses.after(tries))
            return outcome
    except TimeoutError:
        return None


async def _judge(lane: ServerLane, model: str, names: list[str] | None, outcome: Answer | Trouble | None) -> str:
    if outcome is None:
        return f"is reached, and has not answered within {duration(SECONDS_OF_AN_ANSWER)}: it may be loading or busy"
    if (
        isinstance(outcome, Trouble)
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
    raise UserError(
        f"{about(lane, outcome)} ({TRIES} times). Is base_url right, and is {model!r} a model that it serves?"
    )


def _is_in(model: str, names: list[str]) -> bool:
    return model in names or f"models/{model}" in names  # Gemini lists its names so
