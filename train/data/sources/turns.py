"""Turns of a conversation and definitions of tools, as data sets write them -> messages as chat templates take them.

| of a message     | its names                                                                                        |
|------------------|--------------------------------------------------------------------------------------------------|
| role             | `role`, `from` (ShareGPT); the roles of `ROLES`                                                  |
| content          | `content`, `value` (ShareGPT); a text or a list of text parts                                    |
| reasoning        | `reasoning_content` (most templates), `thinking` (gpt-oss, LFM2.5), `reasoning` (vLLM)           |
| calls of tools   | `tool_calls`, `function_call` (OpenAI's older name)                                              |
| trained or not   | `train`, `training` (axolotl), `weight` (OpenAI, Mistral), `loss`, `loss_scale` (ms-swift),      |
|                  | `loss_weight` (LLaMA-Factory), `trainable`: true or 1, false or 0; `masked` (torchtune): reversed |
| kept as they are | `name`, `tool_call_id`                                                                           |

Two names of one thing with different values are a fault of the row. Switches for a part of a message (axolotl's
`train_detail`), for a share of its loss (`weight: 0.5`) or that train a message which is no answer are faults too.
Other keys are collected in `unread`.
"""

import json
from typing import Any

from train.data.sources.row_errors import RowError, checked, filled, is_blank, parsed, shown
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
"""The names that data sets use, and the four that templates know."""

_ROLES_OF_CALLS = ("function_call", "tool_call")
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CALL_KEYS = ("tool_calls", "function_call")
_KEPT_KEYS = ("name", "tool_call_id")
_SWITCHES = ("train", "training", "weight", "loss", "loss_scale", "loss_weight", "trainable", "masked")
_PART_SWITCHES = ("train_detail", "training_detail")
_PLAIN_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS))
TURN_KEYS = _PLAIN_KEYS.union(_REASONING_KEYS, _CALL_KEYS, _KEPT_KEYS, _SWITCHES, _PART_SWITCHES)
"""The keys of a message that are read."""


def read_turns(value: Any, column: str, unread: Unread) -> list[Message]:
    """Return the messages in `value`, a list of turns or the JSON of one. Raises RowFault."""
    if isinstance(value, str):
        value = parsed(value, f"`{column}`")
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"`{column}` is {shown(value)}; a list of messages is wanted")
    return [_turn(turn, number, column, unread) for number, turn in enumerate(value, 1)]


def new_message(role: str, content: str) -> Message:
    """Return a message as templates take it."""
    return {"role": role, "content": content}


def _turn(turn: Any, number: int, column: str, unread: Unread) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = parsed(turn, f"message {number}")
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"message {number} is {shown(turn)}; an object with role and content is wanted")
    name, role = _role(turn, number, column, unread)
    other = filled(turn, _CONTENT_KEYS, f"message {number}: ") if "value" in turn else None
    content = turn[other] if other else turn.get("content")
    more = turn.keys() - _PLAIN_KEYS
    is_call = name in _ROLES_OF_CALLS
    if not more and not is_call:
        return new_message(role, _content(content, number, column, unread))

    key = filled(turn, _CALL_KEYS, f"message {number}: ")
    calls = turn[key] if key else None
    if is_call and not calls:  # ShareGPT and ms-swift: the call is the value
        calls, content = content, ""
    read = new_message(role, _content(content, number, column, unread))
    if calls:
        if role != "assistant":
            raise RowError("wrong type", f"message {number} ({role}) has tool calls, which only an assistant makes")
        read["tool_calls"] = _tool_calls(calls, number)
    for key in _KEPT_KEYS:
        if turn.get(key) is not None:
            read[key] = checked(turn[key], f"`{key}` of message {number}")
    key = filled(turn, _REASONING_KEYS, f"message {number}: ")
    if key:
        if role != "assistant":
            raise RowError("wrong type", f"message {number} ({role}) has `{key}`, which only an assistant writes")
        read["reasoning_content"] = checked(turn[key], f"`{key}` of message {number}")
    train = _train(turn, number, role)
    if train is not None:
        read["train"] = train
    for key in more - TURN_KEYS:
        collect(unread, f"{column}[].{key}", turn[key])
    return read


def _role(turn: Message, number: int, column: str, unread: Unread) -> tuple[Any, str]:
    """Return the role as the turn names it and as templates name it. Raises RowFault."""
    name, other = turn.get("role"), turn.get("from")
    if name is None:
        name, other = other, None
    role = ROLES.get(name) or ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError("unknown role", f"message {number} has the role {shown(name)}; known are {', '.join(ROLES)}")
    if other is not None:
        if isinstance(other, str) and ROLES.get(other, role) != role:
            raise RowError(
                "conflicting values", f"message {number}: `role` is {shown(name)}, and `from` is {shown(other)}"
            )
        if not isinstance(other, str) or other not in ROLES:
            collect(unread, f"{column}[].from", other)
    return name, role


def _train(turn: Message, number: int, role: str) -> bool | None:
    """Return what the switches of a turn say, None where it has none. Raises RowFault."""
    for key in _PART_SWITCHES:
        if not is_blank(turn.get(key)):
            raise RowError(
                "unsupported loss switch",
                f"`{key}` of message {number} is for parts of it; a message is trained as a whole or not at all",
            )
    train: bool | None = None
    first = ""
    for key in _SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError("wrong type", f"`{key}` of message {number} is {shown(value)}; true or false is wanted")
        said = bool(value) != (key == "masked")
        if train is not None and said != train:
            raise RowError("conflicting values", f"message {number}: `{first}` and `{key}` contradict each other")
        train, first = said, key
    if train and role != "assistant":
        raise RowError(
            "unsupported loss switch",
            f"`{first}` of message {number} ({role}) would train it; only messages of the assistant are trained",
        )
    return train


def _content(content: Any, number: int, column: str, unread: Unread) -> str:
    """Return the text, also of a list of parts; None is empty."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return checked(content, f"the content of message {number}")
    texts: list[str] = []
    for part in content:
        text = part
        if isinstance(part, dict) and part.get("type", "text") == "text" and not part.keys().isdisjoint(_TEXTS):
            key = filled(part, _TEXTS, f"message {number}: ")
            text = part[key] if key else part.get("text") or part.get("value") or ""
            for key in part.keys() - {"type", *_TEXTS}:
                collect(unread, f"{column}[].content[].{key}", part[key])
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowError("unsupported content", f"message {number} has a part {shown(kind)}; only text is trained")
        texts.append(checked(text, f"the content of message {number}"))
    return "".join(texts)


_TEXTS = ("text", "value")
"""Names of the text in a part of a content: most have the first, LLaMA-Factory the second."""


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls as templates want them: {"type": "function", "function": {"name": ..., "arguments": {...}}}.

    OpenAI's interface has the arguments as a string of JSON, which templates would quote a second time; Llama 3.1 calls
    them parameters. Other keys stay: some templates write the whole call.
    """
    where = f"the tool calls of message {number}"
    if isinstance(calls, str):
        calls = parsed(calls, where)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list | tuple) or not calls:
        raise RowError("wrong type", f"{where} are {shown(calls)}; a list of calls is wanted")
    wrapped = []
    for call in calls:
        call = _wrapped(call, where)
        function = dict(call["function"])
        key = filled(function, ("arguments", "parameters"), f"{where}: ")
        arguments = function.get("arguments") if key is None else function[key]
        function.pop("parameters", None)
        if isinstance(arguments, str):
            arguments = (
                parsed(arguments, f"the arguments of {function['name']} in message {number}") if arguments else {}
            )
        function["arguments"] = {} if arguments is None else arguments
        wrapped.append({**call, "function": function})
    _check_json(wrapped, where)
    return wrapped


def read_tools(tools: Any, column: str) -> list[dict[str, Any]] | None:
    """Return the definitions of tools in `tools`, a list or the JSON of one; None where there are none.

    Raises RowFault.
    """
    if isinstance(tools, str):
        tools = parsed(tools, f"`{column}`") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise RowError("wrong type", f"`{column}` is {shown(tools)}; a list of functions is wanted")
    wrapped = [_wrapped(tool, f"`{column}`") for tool in tools]
    _check_json(wrapped, f"`{column}`")
    return wrapped or None


def _check_json(value: Any, where: str) -> None:
    """Raise RowFault where a template couldn't write `value` as JSON: half of a surrogate pair, NaN, infinity."""
    try:
        checked(json.dumps(value, ensure_ascii=False, default=str, allow_nan=False), where)
    except ValueError as fault:
        raise RowError("wrong type", f"{where}: NaN and infinity are no numbers of JSON") from fault


def _wrapped(function: Any, where: str) -> dict[str, Any]:
    """A function or a call of one in the form {"type": "function", "function": {"name": ...}}, flat ones wrapped."""
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = parsed(function, where)
    if isinstance(function, dict) and "function" not in function and "name" in function:
        outer = {key: function[key] for key in ("id",) if key in function}
        flat = {key: value for key, value in function.items() if key not in ("id", "type")}
        function = {**outer, "type": "function", "function": flat}
    named = function.get("function") if isinstance(function, dict) else None
    if not isinstance(named, dict) or not isinstance(named.get("name"), str):
        raise RowError("wrong type", f"{where}: {shown(function)} is no object with the name of a function")
    return {"type": "function", **function}
