"""Rendering: a conversation -> text in the form of its template, and the checks that the template lost nothing."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from train.data.chat.template import variables_of
from train.data.sources.formats import TEMPLATE_KWARGS, Message, RowError
from train.data.sources.unread_text import Unread, collect, is_prose, iter_texts

Span = tuple[int, int]
"""The first character and the end (exclusive)."""
Tools = list[dict[str, Any]] | None

_SENTINEL = re.compile("\ue000([^\ue000\ue001]*)\ue001")
_THINK_TAG = re.compile(r"</?think>")


class ShortcutError(Exception):
    """A shortcut gives another result than the template or the tokenizer; the message says for which text."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the character spans that the model is trained to write.

    `weights`: the loss weight of each span; empty if all are 1.
    """

    text: str
    spans: list[Span]
    weights: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """The form of messages that a template takes: contents as parts, arguments as JSON, None for no content."""

    parts: bool = False
    json_arguments: bool = False
    none_content: bool = False

    def adapt(self, message: Message) -> Message:
        """Return the message in this form."""
        content = message.get("content") or ""
        calls = message.get("tool_calls")
        if not isinstance(content, str):
            return message
        adapted: Message = {**message, "content": [{"type": "text", "text": content}] if self.parts else content}
        if calls and self.none_content and not content:
            adapted["content"] = None
        if calls and self.json_arguments:
            adapted["tool_calls"] = [_with_json_arguments(call) for call in calls]
        return adapted


def _with_json_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def render_row(
    messages: list[Message], tools: Tools, form: Form, template: str, *, marked: bool, variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the spans inside `{% generation %}` if the template is `marked`, else [].

    `variables`: all that the template gets beside messages and tools.
    Raises RowError if the template refuses the conversation. A template is a program and may raise any exception.
    """
    try:
        texts, marks = render_jinja_template(
            conversations=[[form.adapt(message) for message in messages]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **variables,
        )
    except Exception as error:
        raise RowError("refused by the template", describe_exception(error)) from error
    return str(texts[0]), [(start, end) for start, end in marks[0]] if marked else []


def describe_exception(error: Exception) -> str:
    """Return why a template could not be rendered, on one line and without a full stop."""
    message = " ".join(show_sentinels(str(error)).split()).rstrip(".")
    kind = type(error).__name__
    if not message:
        return kind
    return message if type(error).__module__.startswith("jinja2") else f"{kind}: {message}"


def show_sentinels(text: str) -> str:
    """Return `text` with the sentinels of probe conversations in a readable form: {question}."""
    return _SENTINEL.sub(r"{\1}", text).replace("\ue000", "").replace("\ue001", "")


def check_answer(message: Message, window: str, *, last_part: bool = False) -> None:
    """Raise RowError unless content, reasoning and called tools of an assistant message are in `window`.

    Templates trim contents and write reasoning apart from the rest. `last_part`: the text after reasoning is enough.
    """
    content = (message.get("content") or "").strip()
    if content not in window:
        parts = [part.strip() for part in _THINK_TAG.split(content)]
        if any(part not in window for part in (parts[-1:] if last_part else parts)):
            raise RowError(
                "answer lost by the template", f"not in the text that the model must write: {content[:60]!r}"
            )
    if last_part:
        return
    reasoning = (message.get("reasoning_content") or "").strip()
    if reasoning not in window:
        raise RowError(REASONING_LOST, f"this reasoning is not in the render: {reasoning[:60]!r}")
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name", "")
        if name not in window:
            raise RowError("tool call lost by the template", f"the call of {name} is not in the render")


def check_others(messages: list[Message], tools: Tools, rendering: Rendering) -> None:
    """Raise RowError unless all other messages and the tools are in the text that is not trained."""
    parts = [rendering.text[before:start] for before, start in gaps(rendering)]
    for message in messages:
        if message["role"] == "assistant":
            continue
        content = (message.get("content") or "").strip()
        forms = [content]
        if message["role"] == "tool":  # some templates quote results as JSON
            forms += [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        if not any(form in part for form in forms for part in parts):
            raise RowError(f"{message['role']} message lost by the template", f"{content[:60]!r}")
    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if not any(name in part for part in parts):
            raise RowError("tools lost by the template", f"{name} is not in the render")


def gaps(rendering: Rendering) -> list[Span]:
    """Return the stretches before, between and after the spans."""
    starts = [0, *(end for _, end in rendering.spans)]
    ends = [*(start for start, _ in rendering.spans), len(rendering.text)]
    return list(zip(starts, ends, strict=True))


def find_left_out(
    messages: list[Message], tools: Tools, kwargs: Mapping[str, Any], template: str, renders: Sequence[str]
) -> Unread:
    """Return the texts of a conversation that no render holds, by the names of their columns and keys.

    `check_answer` and `check_others` cover contents. Here it is the rest: names and ids, arguments of calls,
    descriptions of tools, and the variables that the row sets. A short text, a number or a truth value may be a switch
    of the template (`reasoning_effort: high`): then the template must use the variable.
    """
    missing: Unread = {}
    for message in messages:
        for key in message.keys() & _BESIDE_CONTENT:
            if not _is_in(message[key], renders):
                collect(missing, f"messages[].{key}", message[key])
        for call in message.get("tool_calls") or ():
            for key in call.keys() - {"type"}:
                for text in _iter_texts(call[key]):
                    if not _is_in(text, renders):
                        collect(missing, f"messages[].tool_calls[].{key}", text)
    for tool in tools or ():
        if not _is_rendered_as_json(tool, renders):
            for text in _names_and_descriptions(tool):
                if not _is_in(text, renders):
                    collect(missing, "tools[].description", text)
    for name, value in kwargs.items():
        used = name in variables_of(template)
        missing_texts = [
            text for text in iter_texts(value) if not (_is_in(text, renders) or (used and not is_prose(text)))
        ]
        for item in missing_texts or ([] if used or any(iter_texts(value)) else [value]):
            collect(missing, f"{TEMPLATE_KWARGS}.{name}", item)
    return missing


_BESIDE_CONTENT = {"name", "tool_call_id"}
REASONING_LOST = "reasoning lost by the template"
"""The kind of error of a row whose reasoning another template could write."""


def _is_rendered_as_json(value: Any, renders: Sequence[str]) -> bool:
    """Return whether a render holds a value as templates' `tojson` writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return any(text in render for render in renders)


def _is_in(text: str, renders: Sequence[str]) -> bool:
    """Return whether each line of a text is in a render, or the text quoted as JSON."""
    lines = [line.strip() for line in text.splitlines()]
    if all(any(line in render for render in renders) for line in lines):
        return True
    quoted = [json.dumps(text.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    quoted += [json.dumps(form, ensure_ascii=False)[1:-1] for form in quoted]
    return any(form in render for form in quoted for render in renders)


def _iter_texts(value: Any) -> Iterator[str]:
    """Yield all texts in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iter_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_texts(item)


def _names_and_descriptions(tool: Any) -> Iterator[str]:
    """Yield the names and descriptions in the definition of a tool, not the keywords of its JSON schema."""
    if isinstance(tool, dict):
        for key, item in tool.items():
            if key in ("name", "description") and isinstance(item, str):
                yield item
            else:
                yield from _names_and_descriptions(item)
    elif isinstance(tool, list):
        for item in tool:
            yield from _names_and_descriptions(item)
