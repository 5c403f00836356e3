"""Diagnosis of server errors that end a run: the cause and the remedy, in one paragraph."""

import difflib
import re
import time

from train.formatting import duration
from train.llm.server import ServerConnection
from train.llm.server_errors import DENIED, ServerError

SHOWN_MODELS = 10
_START_IT = (
    "Check host and port, and that the server is running. For one that is still starting, --wait-for-server 30m waits "
    "as long."
)
_BEHIND_PORT = (
    "The port is open, and no model server answers behind it. Check that the server is running, and that the port of a "
    "container or tunnel (docker, ssh -L, kubectl port-forward) leads to its own. For one that is still starting, "
    "--wait-for-server 30m waits as long."
)


def describe(server: ServerConnection, error: ServerError) -> str:
    """Return the subject and verb of a sentence about a server's error."""
    message = error.message.rstrip(".")
    has_response = error.status is not None or error.kind not in ("unreachable", "dropped")
    return f"{server.name} {'answers ' if has_response and not error.is_connection_failure else ''}{message}"


def describe_unreachable(server: ServerConnection, error: ServerError, waited: float = 0.0) -> str:
    """Return that a server can't be reached, the reason and the remedy. `waited`: seconds of retries."""
    if proxy := server.endpoint.address.proxy:
        advice = f"Check that the proxy is running, unset {proxy.variable}, or name the server's host in no_proxy."
    else:
        advice = _BEHIND_PORT if error.kind == "dropped" else _START_IT
    tries = f", tried for {duration(waited)}" if waited >= 1 else ""
    return f"{describe(server, error)}{tries}. {error.advice or advice}"


async def explain(server: ServerConnection, model: str, error: ServerError, *, run_continues: bool = False) -> str:
    """Return the cause of an error and the remedy. `run_continues`: other servers do the work."""
    text = describe(server, error)
    if error.advice:
        return f"{text}. {error.advice}"
    resume = "Answers so far are in the journal: start the same command again, and it continues from there"
    match error.status:
        case 401 | 403 if server.has_answered and run_continues:
            return f"{text}. It answered before: the key may have expired or reached its limit."
        case 402 if run_continues:
            return f"{text}. Add credit or raise the limit."
        case 401 | 403 if server.has_answered:
            return (
                f"{text}, to {len(server.denied)} requests in a row. It answered others before: the key may have "
                f"expired or reached its limit. {resume} when the key is accepted."
            )
        case _ if error.status in DENIED and server.has_answered:
            return (
                f"{text}, for {duration(time.monotonic() - server.denied_since)}. It answered other requests before: "
                f"check that it still serves {model!r} at this address. {resume} when it does."
            )
        case 401 | 403 if server.endpoint.key is None:
            return f"{text}. It requires a key: name the environment variable that holds it as key_variable."
        case 401 | 403:
            return f"{text}. The key in the environment is not accepted for {model}."
        case 404 | 405:
            return f"{text}. {await _advise_on_path(server, model, error)}"
        case 402:
            return f"{text}. Add credit, raise the limit or name another server. {resume}."
        case _:
            return f"{text}. {resume} when this is solved."


async def _advise_on_path(server: ServerConnection, model: str, error: ServerError) -> str:
    names = await server.endpoint.list_models()
    if names is not None and model in names:
        return (
            f"It lists {model!r} among its models, and refuses it all the same: check that this key may use it, and "
            "see the server's log."
        )
    if names is not None and error.status == 404:
        return f"It was asked for the model {model!r}; {list_names(model, names)}."
    if base_url := await server.endpoint.find_base_url():
        return f"Write {base_url} as base_url."
    if names is None and re.search(rf"(?<!\w){re.escape(model)}(?!\w)", error.message):
        return f"Is {model!r} the name under which the server has the model?"
    return "base_url is probably wrong: for most servers it ends in /v1."


def list_names(model: str, names: list[str]) -> str:
    """Return the models that a server lists, the most similar names first if there are many."""
    similar = difflib.get_close_matches(model, names, SHOWN_MODELS, 0.5) if len(names) > SHOWN_MODELS else []
    shown = [*similar, *(name for name in sorted(names) if name not in similar)][:SHOWN_MODELS]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return f"it lists: {', '.join(shown) or 'none'}{more}"
