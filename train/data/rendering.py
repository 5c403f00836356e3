"""A conversation as text, and the proof that the template lost nothing of it."""

import json
import re
from dataclasses import dataclass
from typing import Any

from train.data.formats import Message, RowFault

Span = tuple[int, int]
"""First character, and the one behind the last."""
Tools = list[dict[str, Any]] | None

_THINK_TAG = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the character spans that the model is trained to write."""

    text: str
    spans: list[Span]


def check_answer(message: Message, window: str, *, last_part: bool = False) -> None:
    """Raise RowFault unless all that an assistant says is in `window`: content, reasoning, the tools that it calls.

    Templates trim contents, and write reasoning apart from the rest. `last_part`: what stands after it is enough.
    """
    content = (message.get("content") or "").strip()
    if content not in window:
        parts = [part.strip() for part in _THINK_TAG.split(content)]
        if any(part not in window for part in (parts[-1:] if last_part else parts)):
            raise RowFault("answer lost by the template", f"not in what the model is to write: {content[:60]!r}")
    if last_part:
        return
    reasoning = (message.get("reasoning_content") or "").strip()
    if reasoning not in window:
        raise RowFault("reasoning lost by the template", f"reasoning_content is not in the render: {reasoning[:60]!r}")
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name", "")
        if name not in window:
            raise RowFault("tool call lost by the template", f"the call of {name} is not in the render")


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
            raise RowFault(f"{message['role']} message lost by the template", f"{content[:60]!r}")
    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if not any(name in part for part in parts):
            raise RowFault("tools lost by the template", f"{name} is not in the render")


def gaps(rendering: Rendering) -> list[Span]:
    """What lies before, between and after the spans."""
    starts = [0, *(end for _, end in rendering.spans)]
    ends = [*(start for start, _ in rendering.spans), len(rendering.text)]
    return list(zip(starts, ends, strict=True))
