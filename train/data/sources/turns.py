"""Turns and tool definitions as data sets write them -> messages and tools as chat templates take them.

| part of a message | its names                                                                                        |
|-------------------|--------------------------------------------------------------------------------------------------|
| role              | `role`, `from` (ShareGPT); the roles of `ROLES`                                                  |
| content           | `content`, `value` (ShareGPT); a text or a list of text parts                                    |
| reasoning         | `reasoning_content` (most templates), `thinking` (gpt-oss, LFM2.5), `reasoning` (vLLM)           |
| tool calls        | `tool_calls`, `function_call` (OpenAI's older name)                                              |
| loss weight       | see `train.data.sources.loss_weights`                                                            |
| kept unchanged    | `name`, `tool_call_id`                                                                           |

Two names of one thing with different values are a row error. So are loss switches for a part of a message (axolotl's
`train_detail`), and those that train a message which is not an answer. Other keys are collected in `unread`.
"""

import json
from typing import Any

from train.data.sources.loss_weights import WEIGHT_KEYS, read_weight, set_weight
from train.data.sources.row_errors import RowError, check_text, first_filled, parse_json, preview
from train.data.sources.unread_text import Unread, collect

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
"""Role in a data set -> role in a template."""

_ROLES_OF_CALLS = ("function_call", "tool_call")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CALL_KEYS = ("tool_calls", "function_call")
_KEPT_KEYS = ("name", "tool_call_id")
_PLAIN_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS))
TURN_KEYS = _PLAIN_KEYS.union(_REASONING_KEYS, _CALL_KEYS, _KEPT_KEYS, WEIGHT_KEYS)
"""The message keys that are read."""


def read_turns(value: Any, column: str, unread: Unread) -> list[Message]:
    """Return the messages of `value`, a list of turns or its JSON. Raises RowError."""
    if isinstance(value, str):
        value = parse_json(value, f"`{column}`")
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"`{column}` is {preview(value)}; it must be a list of messages")
    return [_turn(turn, number, column, unread) for number, turn in enumerate(value, 1)]


def new_message(role: str, content: str) -> Message:
    """Return a message as templates take it, of a role and a text."""
    return {"role": role, "content": content}


def _turn(turn: Any, number: int, column: str, unread: Unread) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = parse_json(turn, f"message {number}")
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"message {number} is {preview(turn)}; it must be an object with role and content")
    name, role = _role(turn, number, column, unread)
    content_key = first_filled(turn, _CONTENT_KEYS, f"message {number}: ") if "value" in turn else None
    content = turn[content_key] if content_key else turn.get("content")
    extra_keys = turn.keys() - _PLAIN_KEYS
    is_call = name in _ROLES_OF_CALLS
    if not extra_keys and not is_call:
        return new_message(role, _content(content, number, column, unread))

    key = first_filled(turn, _CALL_KEYS, f"message {number}: ")
    calls = turn[key] if key else None
    if is_call and not calls:  # ShareGPT and ms-swift: the call is the value
        calls, content = content, ""
    message = new_message(role, _content(content, number, column, unread))
    if calls:
        if role != "assistant":
            raise RowError("wrong type", f"message {number} ({role}) has tool calls, which only an assistant makes")
        message["tool_calls"] = _tool_calls(calls, number)
    for key in _KEPT_KEYS:
        if turn.get(key) is not None:
            message[key] = check_text(turn[key], f"`{key}` of message {number}")
    key = first_filled(turn, _REASONING_KEYS, f"message {number}: ")
    if key:
        if role != "assistant":
            raise RowError("wrong type", f"message {number} ({role}) has `{key}`, which only an assistant writes")
        message["reasoning_content"] = check_text(turn[key], f"`{key}` of message {number}")
    weight = read_weight(turn, number, role)
    if weight is not None:
        message["train"] = weight > 0
        set_weight(message, weight)
    for key in extra_keys - TURN_KEYS:
        collect(unread, f"{column}[].{key}", turn[key])
    return message


def _role(turn: Message, number: int, column: str, unread: Unread) -> tuple[Any, str]:
    """Return the role under its name in the turn and under its name in templates. Raises RowError."""
    name, other = turn.get("role"), turn.get("from")
    if name is None:
        name, other = other, None
    role = ROLES.get(name) or ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(
            "unknown role", f"message {number} has the role {preview(name)}; it must be one of {', '.join(ROLES)}"
        )
    if other is not None:
        if isinstance(other, str) and ROLES.get(other, role) != role:
            raise RowError(
                "conflicting values", f"message {number}: `role` is {preview(name)}, and `from` is {preview(other)}"
            )
        if not isinstance(other, str) or other not in ROLES:
            collect(unread, f"{column}[].from", other)
    return name, role


def _content(content: Any, number: int, column: str, unread: Unread) -> str:
    """Return the text of a content: a text, a list of text parts, or None for an empty one."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return check_text(content, f"the content of message {number}")
    texts: list[str] = []
    for part in content:
        text = part
        if isinstance(part, dict) and part.get("type", "text") == "text" and not part.keys().isdisjoint(_TEXTS):
            key = first_filled(part, _TEXTS, f"message {number}: ")
            text = part[key] if key else part.get("text") or part.get("value") or ""
            for key in part.keys() - {"type", *_TEXTS}:
                collect(unread, f"{column}[].content[].{key}", part[key])
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError("unsupported content", f"message {number} has a part {preview(kind)}; only text is trained")
        texts.append(check_text(text, f"the content of message {number}"))
    return "".join(texts)


_TEXTS = ("text", "value")
"""Names of the text of a part: most data sets have the first, LLaMA-Factory the second."""


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls in the form of templates: {"type": "function", "function": {"name": ..., "arguments": {...}}}.

    In OpenAI's API the arguments are a string of JSON, which templates would quote a second time; Llama 3.1 calls them
    parameters. Other keys stay: some templates write the complete call.
    """
    where = f"the tool calls of message {number}"
    if isinstance(calls, str):
        calls = parse_json(calls, where)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list | tuple) or not calls:
        raise RowError("wrong type", f"{where} are {preview(calls)}; they must be a list of calls")
    wrapped = []
    for call in calls:
        call = _wrap(call, where)
        function = dict(call["function"])
        key = first_filled(function, ("arguments", "parameters"), f"{where}: ")
        arguments = function.get("arguments") if key is None else function[key]
        function.pop("parameters", None)
        if isinstance(arguments, str):
            arguments = (
                parse_json(arguments, f"the arguments of {function['name']} in message {number}") if arguments else {}
            )
        function["arguments"] = {} if arguments is None else arguments
        wrapped.append({**call, "function": function})
    _check_json(wrapped, where)
    return wrapped


def read_tools(tools: Any, column: str) -> list[dict[str, Any]] | None:
    """Return the tool definitions of `tools`, a list or its JSON; None if there are none. Raises RowError."""
    if isinstance(tools, str):
        tools = parse_json(tools, f"`{column}`") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise RowError("wrong type", f"`{column}` is {preview(tools)}; it must be a list of functions")
    wrapped = [_wrap(tool, f"`{column}`") for tool in tools]
    _check_json(wrapped, f"`{column}`")
    return wrapped or None


def _check_json(value: Any, where: str) -> None:
    """Raise RowError if a template couldn't write `value` as JSON: half of a surrogate pair, NaN, infinity."""
    try:
        check_text(json.dumps(value, ensure_ascii=False, default=str, allow_nan=False), where)
    except ValueError as error:
        raise RowError("wrong type", f"{where}: JSON has no NaN and no infinity") from error


def _wrap(function: Any, where: str) -> dict[str, Any]:
    """Return a function or a call in the form {"type": "function", "function": {"name": ...}}; wrap a flat one."""
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = parse_json(function, where)
    if isinstance(function, dict) and "function" not in function and "name" in function:
        outer = {key: function[key] for key in ("id",) if key in function}
        flat = {key: value for key, value in function.items() if key not in ("id", "type")}
        function = {**outer, "type": "function", "function": flat}
    inner = function.get("function") if isinstance(function, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError("wrong type", f"{where}: {preview(function)} is not an object with the name of a function")
    return {"type": "function", **function}
