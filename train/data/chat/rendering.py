"""A conversation as text, in the form that its template takes, and the proof that the template lost nothing of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from train.data.chat.template import variables_of
from train.data.sources.formats import TEMPLATE_KWARGS, Message, RowError
from train.data.sources.unread_text import Unread, collect, is_prose, texts_in

Span = tuple[int, int]
"""First character, and the one behind the last."""
Tools = list[dict[str, Any]] | None

_SENTINEL = re.compile("\ue000([^\ue000\ue001]*)\ue001")
_THINK_TAG = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the character spans that the model is trained to write."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Form:
    """How a template wants messages: contents as lists of parts, arguments of calls as JSON, no content as None."""

    parts: bool = False
    json_arguments: bool = False
    none_content: bool = False

    def adapted(self, message: Message) -> Message:
        """The message as the template wants it."""
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
    """Text of one conversation and, where the template is `marked`, the spans inside `{% generation %}`.

    `variables`: what the template gets beside messages and tools.
    Raises RowFault where the template refuses the conversation: a template is a program, so with any exception.
    """
    try:
        texts, marks = render_jinja_template(
            conversations=[[form.adapted(message) for message in messages]],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **variables,
        )
    except Exception as fault:
        raise RowError("refused by the template", reason(fault)) from fault
    return str(texts[0]), [(start, end) for start, end in marks[0]] if marked else []


def reason(fault: Exception) -> str:
    """Why a template could not be rendered, on one line and without a full stop."""
    said = " ".join(named(str(fault)).split()).rstrip(".")
    kind = type(fault).__name__
    return said if said and type(fault).__module__.startswith("jinja2") else f"{kind}: {said}" if said else kind


def named(text: str) -> str:
    """`text` with the sentinels that a probe puts into conversations as a person reads them: {question}."""
    return _SENTINEL.sub(r"{\1}", text).replace("\ue000", "").replace("\ue001", "")


def check_answer(message: Message, window: str, *, last_part: bool = False) -> None:
    """Raise RowFault unless all that an assistant says is in `window`: content, reasoning, the tools that it calls.

    Templates trim contents, and write reasoning apart from the rest. `last_part`: what stands after it is enough.
    """
    content = (message.get("content") or "").strip()
    if content not in window:
        parts = [part.strip() for part in _THINK_TAG.split(content)]
        if any(part not in window for part in (parts[-1:] if last_part else parts)):
            raise RowError("answer lost by the template", f"not in what the model is to write: {content[:60]!r}")
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
    """Raise RowFault unless what the others say stands in the text that is not trained."""
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
    """What lies before, between and after the spans."""
    starts = [0, *(end for _, end in rendering.spans)]
    ends = [*(start for start, _ in rendering.spans), len(rendering.text)]
    return list(zip(starts, ends, strict=True))


def left_out(
    messages: list[Message], tools: Tools, kwargs: Mapping[str, Any], template: str, renders: Sequence[str]
) -> Unread:
    """Return the texts of a conversation that none of its renders holds, by the names of their columns and keys.

    What messages say is checked before (`check_answer`, `check_others`); here it is the rest: names and ids, arguments
    of calls, descriptions of tools, and the variables that the row sets. A short text may be a switch for the template
    (`reasoning_effort: high`), and so may a number or a truth value: then the template has to know the variable.
    """
    missing: Unread = {}
    for message in messages:
        for key in message.keys() & _BESIDE_CONTENT:
            if not _is_in(message[key], renders):
                collect(missing, f"messages[].{key}", message[key])
        for call in message.get("tool_calls") or ():
            for key in call.keys() - {"type"}:
                for text in _texts(call[key]):
                    if not _is_in(text, renders):
                        collect(missing, f"messages[].tool_calls[].{key}", text)
    for tool in tools or ():
        if not _written_whole(tool, renders):
            for text in _described(tool):
                if not _is_in(text, renders):
                    collect(missing, "tools[].description", text)
    for name, value in kwargs.items():
        known = name in variables_of(template)
        lost = [text for text in texts_in(value) if not (_is_in(text, renders) or (known and not is_prose(text)))]
        for item in lost or ([] if known or any(texts_in(value)) else [value]):
            collect(missing, f"{TEMPLATE_KWARGS}.{name}", item)
    return missing


_BESIDE_CONTENT = {"name", "tool_call_id"}
REASONING_LOST = "reasoning lost by the template"
"""The kind of fault of a row whose reasoning another template could write."""


def _written_whole(value: Any, renders: Sequence[str]) -> bool:
    """Return whether a value stands in a render as templates' `tojson` writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return any(text in render for render in renders)


def _is_in(text: str, renders: Sequence[str]) -> bool:
    """Return whether each line of a text is in a render, as it is or quoted as JSON."""
    lines = [line.strip() for line in text.splitlines()]
    if all(any(line in render for render in renders) for line in lines):
        return True
    quoted = [json.dumps(text.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    quoted += [json.dumps(form, ensure_ascii=False)[1:-1] for form in quoted]
    return any(form in render for form in quoted for render in renders)


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts within lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _described(tool: Any) -> Iterator[str]:
    """Yield the names and descriptions in the definition of a tool; the words of its JSON schema aside."""
    if isinstance(tool, dict):
        for key, item in tool.items():
            if key in ("name", "description") and isinstance(item, str):
                yield item
            else:
                yield from _described(item)
    elif isinstance(tool, list):
        for item in tool:
            yield from _described(item)
