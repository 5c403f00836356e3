"""Advice on errors that end a run: a wrong key, a wrong model name, a wrong path."""

import asyncio
import difflib
import re
import time
from typing import TYPE_CHECKING, Any

import httpx2
import openai

from train.formatting import duration
from train.llm.server_errors import DENIED, ServerError

if TYPE_CHECKING:
    from train.llm.server import ServerConnection

SECONDS_OF_A_LOOK = 10.0
"""Longest wait for a list of models."""
NAMES_SHOWN = 10
_USUAL_PATHS = ("/v1", "/api/v1", "/openai/v1")
"""Paths of vLLM, llama.cpp, OpenAI and most others, of OpenRouter and Open WebUI, and of Groq and Azure."""


def about(lane: "ServerConnection", trouble: ServerError) -> str:
    """Return the beginning of a sentence about a server's trouble."""
    what = trouble.what.rstrip(".")
    is_silent = trouble.status is None and trouble.kind in ("gone", "dropped")
    return f"{lane.name} {what if is_silent or is_unreachable(trouble) else f'answers {what}'}"


async def explain(lane: "ServerConnection", model: str, trouble: ServerError, *, others_go_on: bool = False) -> str:
    """Return what is wrong and what to do about it, in one paragraph. `others_go_on`: the run doesn't end by that."""
    said = f"{about(lane, trouble)}."
    if trouble.advice:
        return f"{said} {trouble.advice}"
    go_on = "What was answered so far is in the journal: start the same command again, and it goes on from there"
    match trouble.status:
        case 401 | 403 if lane.has_answered and others_go_on:
            return f"{said} It answered before: the key may have expired or reached its limit."
        case 402 if others_go_on:
            return f"{said} Add credit or raise the limit."
        case 401 | 403 if lane.has_answered:
            return (
                f"{said.rstrip('.')}, to {len(lane.denied)} requests in a row. It answered others before: the key may "
                f"have expired or reached its limit. {go_on} when the key is accepted."
            )
        case _ if trouble.status in DENIED and lane.has_answered:
            return (
                f"{said.rstrip('.')}, for {duration(time.monotonic() - lane.denied_since)}. It answered other requests "
                f"before: see whether it still serves {model!r} at this address. {go_on} when it does."
            )
        case 401 | 403 if lane.key is None:
            return f"{said} It wants a key: name the environment variable that holds it as key_variable."
        case 401 | 403:
            return f"{said} The key in the environment is not accepted for {model}."
        case 404 | 405:
            return f"{said} {await _advise_on_path(lane, model, trouble)}"
        case 402:
            return f"{said} Add credit, raise the limit or name another server. {go_on}."
        case _:
            return f"{said} {go_on} when this is solved."


def is_unreachable(trouble: ServerError) -> bool:
    """Return whether a trouble is a connection that failed, and not what a gateway says."""
    return trouble.what.startswith("can't be reached")


async def _advise_on_path(lane: "ServerConnection", model: str, trouble: ServerError) -> str:
    names = await list_models(lane)
    if names is not None and model in names:
        return (
            f"It lists {model!r} among its models, and refuses it all the same: see whether this key may use it, and "
            "what the server's log says."
        )
    if names is not None and trouble.status == 404:
        return f"It was asked for the model {model!r}; {name_models(model, names)}."
    if better := await find_base_url(lane):
        return f"Write {better} as base_url."
    if names is None and re.search(rf"(?<!\w){re.escape(model)}(?!\w)", trouble.what):
        return f"Is {model!r} the name that the server knows the model by?"
    return "base_url is probably wrong: for most servers it ends in /v1."


def name_models(model: str, names: list[str]) -> str:
    """Return which models a server lists, the most similar names first where there are many."""
    near = difflib.get_close_matches(model, names, NAMES_SHOWN, 0.5) if len(names) > NAMES_SHOWN else []
    shown = [*near, *(name for name in sorted(names) if name not in near)][:NAMES_SHOWN]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return f"those it names are: {', '.join(shown) or 'none'}{more}"


async def look(lane: "ServerConnection") -> int | None:
    """Return the status with which a server answers a look at its models; None where it sends no response at all."""
    options: Any = {"timeout": SECONDS_OF_A_LOOK}
    try:
        response = await lane.api.get(lane.address.url("models"), cast_to=httpx2.Response, options=options)
    except openai.APIStatusError as error:
        response = error.response
    except openai.OpenAIError:
        return None
    lane.reached = True
    return response.status_code


async def list_models(lane: "ServerConnection", base: httpx2.URL | None = None) -> list[str] | None:
    """Return the names of the models that a server lists, at another base if given; None where it lists none."""
    entries = await _listed(lane, base)
    return None if entries is None else [name for names in entries for name in names]


async def only_model(lane: "ServerConnection") -> list[str] | None:
    """Return the names of the one model that a server lists; None where it lists several, or none."""
    entries = await _listed(lane)
    return entries[0] if entries and len(entries) == 1 else None


async def _listed(lane: "ServerConnection", base: httpx2.URL | None = None) -> list[list[str]] | None:
    """Return the models that a server lists, each by its id and its aliases (llama.cpp's)."""
    try:
        url = lane.address.url("models", base)
        response = await lane.api.get(url, cast_to=httpx2.Response, options={"timeout": SECONDS_OF_A_LOOK})
        lane.reached = True
        body = response.json()
    except openai.APIStatusError:
        lane.reached = True
        return None
    except (openai.OpenAIError, ValueError):
        return None
    entries = body.get("data") if isinstance(body, dict) else body  # Together sends the bare list
    if not isinstance(entries, list):
        return None
    named = [_names_of(entry) for entry in entries if isinstance(entry, dict)]
    return [[lane.clean(name) for name in names] for names in named if names]


def _names_of(entry: dict[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    names = [entry.get("id"), *(aliases if isinstance(aliases, list) else ())]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


async def find_base_url(lane: "ServerConnection") -> str | None:
    """Return another address of the same server, at which it has a chat API; None where none is found.

    It has one where it lists models, or refuses to GET what is for POST alone (`transformers serve` without a cache
    lists none).
    """
    path = lane.address.base.raw_path.decode("ascii").rstrip("/")
    paths = dict.fromkeys([f"{path}/v1", path.removesuffix("/v1"), *_USUAL_PATHS])
    bases = [lane.address.with_path(other or "/") for other in paths if other != path]
    for look in (list_models, _takes_chats):
        found = await asyncio.gather(*(look(lane, base) for base in bases))
        for base, is_there in zip(bases, found, strict=True):
            if is_there:
                return lane.address.shown_at(base)
    return None


async def _takes_chats(lane: "ServerConnection", base: httpx2.URL) -> bool:
    try:
        url = lane.address.url("chat/completions", base)
        await lane.api.get(url, cast_to=httpx2.Response, options={"timeout": SECONDS_OF_A_LOOK})
    except openai.APIStatusError as error:
        return error.status_code == 405
    except openai.OpenAIError:
        return False
    return False
