"""Refused requests: the part of a request that a server rejects, and the setting to change.

OpenAI names a field in `param`, pydantic in `loc`; gateways quote either in a sentence, in JSON inside a message, or in
another spelling (presencePenalty). So all text of an error is searched, only for fields that the request had.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from train.llm.server_errors import is_about_length

_NO_SAMPLING_PARAMETERS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options")

SettingFormatter = Callable[[str, str, str], str]
"""Returns how a command's user sets a value; arguments: stage, request field (or system_role) and value."""

_LONGEST = 4_000
"""Characters of an error that are searched."""
_ECHOES = frozenset(("input", "input_value", "ctx", "url", "callstack", "stacktrace", "traceback"))
"""Keys of an error that repeat the request or quote the server's code."""

_NOT_SUPPORTED = r"(?:not|n't|un|no longer)[ _-]?(?:support|permitted|allowed|enabled|accepted|recogni[sz]ed|known)"
_USE_COMPLETION_TOKENS = re.compile(r"\buse\W{0,3}(?:the\W{0,3})?max_?completion_?tokens", re.IGNORECASE)
_BY_NAME = (
    rf"\b{{0}}\b.{{{{0,60}}}}?(?:{_NOT_SUPPORTED}|deprecated)"
    r"|(?:unsupported|unknown|unrecogni[sz]ed|unexpected|not permitted)[^.]{{0,60}}\b{0}\b"
)
"""A field that is refused by its name, not by its value."""
_MAX_TOKENS = re.compile(_BY_NAME.format("max_?tokens"), re.IGNORECASE | re.DOTALL)
_MAX_COMPLETION_TOKENS = re.compile(_BY_NAME.format("max_?completion_?tokens"), re.IGNORECASE | re.DOTALL)
_STREAM = re.compile(
    r"only supports? (?:the )?stream|\bstream(?:ing)?(?: mode)? only\b|\bstream(?:ing)? (?:is )?(?:required|mandatory)"
    r"|requires? (?:the )?stream|\bstream\W{0,3}(?:must|should|has to|needs to) be (?:set to )?\W?true"
    r"|enable the stream|\bnon-?stream|\bstream\W{0,3}=\W{0,3}(?:true\W{0,3}is required|false)|非流式",
    re.IGNORECASE,
)
_SYSTEM_ROLE = re.compile(
    rf"\b(?:system|developer)[\W_]{{0,3}}(?:role|message|prompt|instruction)s?\b.{{0,40}}?{_NOT_SUPPORTED}"
    r"|(?:not|n't|cannot|un)[ -]?(?:support|accept|allow)\w*\W.{0,30}?\bsystem\b"
    r"|(?:unknown|invalid|unexpected|illegal)\b.{0,20}\brole\b.{0,20}\bsystem\b"
    r"|\bonly\b.{0,10}\buser\b.{0,40}\broles? (?:is|are) (?:supported|allowed)"
    r"|\brole\b.{0,40}(?:should|must) be\b(?=.{0,40}\buser\b)(?!.{0,80}\bsystem\b)",
    re.IGNORECASE | re.DOTALL,
)
_ALTERNATE = re.compile(r"\broles must alternate\b", re.IGNORECASE)
_REFUSES = re.compile(
    r"support|permitted|allowed|forbidden|unknown|unrecogni[sz]ed|unexpected|invalid|deprecated|\bboth\b|\bmust\b"
    r"|\bshould\b|\bonly\b|cannot|can't|can not|\brange\b|between|greater|less than|不支持",
    re.IGNORECASE,
)


def extract_error_text(error: Any, text: str) -> str:
    """Return all text of an error response, without the request that it repeats; `text`: the raw body."""
    return " ".join(_iter_strings(error) if isinstance(error, Mapping | list) and error else [text])[:_LONGEST]


def _iter_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value[:_LONGEST]
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in _ECHOES:
                yield from _iter_strings(part)
    elif isinstance(value, list):
        for part in value[:20]:
            yield from _iter_strings(part)


def requires_completion_tokens(text: str) -> bool:
    """Return True if an error refuses `max_tokens` by its name, not by its value."""
    return bool(_USE_COMPLETION_TOKENS.search(text) or _MAX_TOKENS.search(text))


def requires_stream(text: str) -> bool:
    """Return True if an error says that a request must be streamed."""
    return bool(_STREAM.search(text))


def refuses_system_role(text: str, messages: Collection[Mapping[str, Any]]) -> bool:
    """Return True if an error refuses the system message among `messages`."""
    rest = [message["role"] for message in messages if message["role"] != "system"]
    if len(rest) == len(messages):
        return False
    if _SYSTEM_ROLE.search(text):
        return True
    alternate = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(rest))
    return alternate and bool(_ALTERNATE.search(text)) and "optional system message" not in text


def names_field(text: str, field: str) -> bool:
    """Return True if an error names a request field, in snake case or camel case."""
    return bool(re.search(rf"(?<![a-z]){field.replace('_', '[_ ]?')}(?![a-z])", text, re.IGNORECASE))


def refused_fields(error: Any, text: str, body: Mapping[str, Any]) -> list[str]:
    """Return the sampling parameters of `body` that an error is about."""
    fields = [name for name in body if name not in _NO_SAMPLING_PARAMETERS]
    param = error.get("param") if isinstance(error, Mapping) else None
    if isinstance(param, str) and (last := param.rpartition(".")[2]) in fields:
        return [last]
    if is_about_length(text) or not _REFUSES.search(text):
        return []
    return [name for name in fields if names_field(text, name)]


def suggest_setting(
    error: Any, text: str, body: Mapping[str, Any], stage: str, format_setting: SettingFormatter
) -> str:
    """Return the setting to change after a refusal, as a sentence; empty if it is about no setting.

    Args:
        error: the error object of the response.
        text: `extract_error_text` of it.
        body: the request's body.
        stage: the request's stage.
        format_setting: formats a setting as the command's user writes it.
    """
    if refuses_system_role(text, body["messages"]):
        return f"If the model has no system role, set {format_setting(stage, 'system_role', 'merge_into_user')}."
    if "enable_thinking" in text and requires_stream(text):
        return f"Turn off its thinking: {format_setting(stage, 'enable_thinking', 'false')}."
    if "max_tokens" in body and requires_completion_tokens(text):
        setting = format_setting(stage, "max_completion_tokens", str(body["max_tokens"]))
        return f"Send the token limit under the other name: {setting}."
    if "max_completion_tokens" in body and _MAX_COMPLETION_TOKENS.search(text):
        return f"Send the token limit as max_tokens, or none: {format_setting(stage, 'max_tokens', 'null')}."
    if "stream" in body and requires_stream(text):
        return "It refuses requests with and without a stream: this server can't serve the model."
    fields = refused_fields(error, text, body)
    settings = [format_setting(stage, name, "null") for name in fields]
    if len(settings) > 1:
        is_choice = re.search(r"\bboth\b|only one|either|together", text)
        return f"Leave out one of them: {' or '.join(settings)}." if is_choice else f"Leave out {', '.join(settings)}."
    return f"Leave it out: {settings[0]}." if settings else ""


def format_config_key(stage: str, field: str, value: str) -> str:
    """Format a setting as a key of a configuration file."""
    if field == "system_role":
        return f"`system_role: {value}`"
    own = field in ("temperature", "top_p", "seed")
    return f"`{stage}.{field}: {value}`" if own else f"`{stage}.extra: {{{field}: {value}}}`"


def option_formatter(own: Collection[str], prefix: str = "") -> SettingFormatter:
    """Return a formatter of options with a `prefix`; `own`: the request fields that have an option of their own."""

    def format_option(stage: str, field: str, value: str) -> str:
        if field in own or field == "system_role":
            return f"--{prefix}{field.replace('_', '-')} {value}"
        return f"--{prefix}extra '{json.dumps({field: json.loads(value)})}'"

    return format_option
