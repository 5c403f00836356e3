"""Rows as data sets have them -> messages as chat templates take them.

| format            | columns                                                                                          |
|-------------------|--------------------------------------------------------------------------------------------------|
| messages          | `messages`: turns of role and content                                                            |
| sharegpt          | `conversations`: turns of from and value                                                         |
| prompt_completion | `prompt` and `completion`: strings, or lists of turns                                            |
| janus             | `prompt` (older: `user_prompt`, `instruction`) and `output`                                      |
| alpaca            | `instruction`, `output`; `input` and `history` where given                                       |
| question_answer   | `question`, `query` or `instruction`, and `answer` or `response`                                 |
| exchanges         | `conversation`: exchanges of input and output (Capybara)                                         |

Beside each of them: `system` (or `system_prompt`), which becomes the first message, and `tools` (a list, or JSON).
Other columns are ignored. Anything that is a list of turns or tools may be a string of JSON, as CSV has it.

A message keeps role, content, tool_calls, name, tool_call_id, reasoning_content and train. Text is never trimmed or
changed. System messages that are empty or blank are left out; any other stays where it stands, or the row is a fault.
Turns after the last answer are kept: nothing in them is trained.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from train.errors import UserError

Row = dict[str, Any]
Message = dict[str, Any]

FAULT_KINDS = {
    "not UTF-8": "bytes that are no UTF-8, or half of a surrogate pair, which no UTF-8 can hold",
    "invalid JSON": "a line, or a text where JSON is wanted, that doesn't parse",
    "invalid CSV": "quotes that don't close, or not as many cells as the header names",
    "missing column": "a column that the format needs isn't there",
    "wrong type": "a number where a text is wanted, a text where a list is, ...",
    "unknown role": "none of the roles in `ROLES`",
    "unsupported content": "an image or another part that is no text",
    "empty content": "a user or assistant message of nothing or of blanks, without tool calls",
    "input not read": "a text in `input`, which only the Alpaca format reads",
    "conflicting system messages": "the system column says something else than the system turn",
    "no assistant turn": "nothing that could be trained",
}
"""Every kind of fault found before a template is involved, and what it means."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The names that data sets use, and the four that templates know."""

SYSTEM_COLUMNS = ("system", "system_prompt")
_JANUS_PROMPTS = ("prompt", "user_prompt", "instruction")
_QUESTIONS = ("question", "query", "instruction")
_ANSWERS = ("answer", "response")
_SHOWN = 60


class RowFault(Exception):  # noqa: N818 - of a row, not of the program
    """Why one row can't be trained: `kind` is shared by many rows, `detail` says what is wrong with this one.

    Faults of this package's reading have a kind of `FAULT_KINDS`; templates and masks add their own.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[type["RowFault"], tuple[str, str]]:
        return RowFault, (self.kind, self.detail)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row as chat templates take it.

    `messages`: role and content, with tool_calls, name, tool_call_id, reasoning_content and train (false: this turn is
    not trained) where given. `place`: where in its file it stands, ":12" or " row 12"; lines and rows count from 1.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    place: str


def detect(columns: Iterable[str]) -> str:
    """The format that these columns mean. Where several would do, the first of the table above.

    `instruction` and `output` are Janus's older columns where a system column stands beside them and no `input` or
    `history` does; both ways of reading them then give the same messages.
    Raises UserError where none fits.
    """
    found = dict.fromkeys(columns)  # in their order, for the message
    if "messages" in found:
        return "messages"
    if "conversations" in found:
        return "sharegpt"
    if {"prompt", "completion"} <= found.keys():
        return "prompt_completion"
    if "output" in found:
        older = any(column in found for column in SYSTEM_COLUMNS) and not {"input", "history"} & found.keys()
        if "prompt" in found or "user_prompt" in found or ("instruction" in found and older):
            return "janus"
        if "instruction" in found:
            return "alpaca"
    if any(column in found for column in _QUESTIONS) and any(column in found for column in _ANSWERS):
        return "question_answer"
    if "conversation" in found:
        return "exchanges"
    names = ", ".join(f"`{column}`" for column in found) or "none"
    raise UserError(
        f"no known format has these columns: {names}. Known are: messages (`messages`), sharegpt (`conversations`), "
        "prompt_completion (`prompt`, `completion`), janus (`system`, `prompt`, `output`), alpaca (`instruction`, "
        "`input`, `output`), question_answer (`question`, `answer`), exchanges (`conversation`). Rename the columns; "
        "extra ones do no harm."
    )


def convert(row: Row, format: str, *, answers_needed: bool = True) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages and tools of `row`, read as `format` (one that `detect` gives). Raises RowFault.

    `answers_needed`: whether a row without an answer to train is at fault, or one with an empty answer.
    """
    messages = _with_system_column(row, _READERS[format](row))
    kept: list[Message] = []
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and not message.get("tool_calls"):
            if message["role"] == "system":
                continue
            may_be_empty = message["role"] == "tool" or (message["role"] == "assistant" and not answers_needed)
            if not may_be_empty:
                raise RowFault("empty content", f"message {number} ({message['role']}) is empty or blank")
        kept.append(message)
    if not answers_needed:
        return kept, _tools(row.get("tools"))
    answers = [message for message in kept if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in kept[:8]) or "none"
        raise RowFault("no assistant turn", f"the roles are: {roles}")
    if not any(message.get("train", True) for message in answers):
        raise RowFault("no assistant turn", "every one says that it is not to be trained")
    return kept, _tools(row.get("tools"))


def _from_turns(column: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        return _turns(_needed(row, column), column)

    return read


def _from_prompt_and_completion(row: Row) -> list[Message]:
    prompt, completion = _needed(row, "prompt"), _needed(row, "completion")
    before = _turns(prompt, "prompt") if _is_list(prompt) else [_message("user", _text(row, "prompt"))]
    after = (
        _turns(completion, "completion") if _is_list(completion) else [_message("assistant", _text(row, "completion"))]
    )
    for message in before:
        if message["role"] == "assistant":
            message.setdefault("train", False)  # of this format only the completion is trained, as in TRL
    return before + after


def _from_janus(row: Row) -> list[Message]:
    column = next((column for column in _JANUS_PROMPTS if row.get(column) is not None), "prompt")
    if row.get("input") is not None and _text(row, "input").strip():
        remedy = "write `format: alpaca`, which reads it after `instruction`, or take the column out"
        raise RowFault("input not read", f"`input` is {_shown(row['input'])}: {remedy}")
    return [_message("user", _text(row, column)), _message("assistant", _text(row, "output"))]


def _from_alpaca(row: Row) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if isinstance(history, str):
        history = _parse(history, "`history`")
    if not isinstance(history, list):
        raise RowFault("wrong type", f"`history` is {_shown(history)}; pairs of question and answer are wanted")
    for number, pair in enumerate(history, 1):
        texts = ["" if text is None else text for text in pair] if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowFault("wrong type", f"`history` item {number} is {_shown(pair)}; [question, answer] is wanted")
        messages += [_message("user", texts[0]), _message("assistant", texts[1])]
    instruction = _text(row, "instruction")
    if row.get("input") is not None and _text(row, "input").strip():
        instruction = f"{instruction}\n{row['input']}" if instruction.strip() else row["input"]
    return [*messages, _message("user", instruction), _message("assistant", _text(row, "output"))]


def _from_question_and_answer(row: Row) -> list[Message]:
    question, answer = (
        next((column for column in columns if row.get(column) is not None), columns[0])
        for columns in (_QUESTIONS, _ANSWERS)
    )
    return [_message("user", _text(row, question)), _message("assistant", _text(row, answer))]


def _from_exchanges(row: Row) -> list[Message]:
    exchanges = _needed(row, "conversation")
    if isinstance(exchanges, str):
        exchanges = _parse(exchanges, "`conversation`")
    messages = []
    for exchange in exchanges if isinstance(exchanges, list | tuple) else (exchanges,):
        if not isinstance(exchange, dict):
            wanted = "a list of objects with input and output is wanted"
            raise RowFault("wrong type", f"`conversation` holds {_shown(exchange)}; {wanted}")
        answer = "" if "output" in exchange and exchange["output"] is None else _text(exchange, "output")
        messages += [_message("user", _text(exchange, "input")), _message("assistant", answer)]
    return messages


_READERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _from_turns("messages"),
    "sharegpt": _from_turns("conversations"),
    "prompt_completion": _from_prompt_and_completion,
    "janus": _from_janus,
    "alpaca": _from_alpaca,
    "question_answer": _from_question_and_answer,
    "exchanges": _from_exchanges,
}


def _with_system_column(row: Row, messages: list[Message]) -> list[Message]:
    columns = [column for column in SYSTEM_COLUMNS if row.get(column) is not None and _text(row, column).strip()]
    if not columns:
        return messages
    system: str = row[columns[0]]
    turns = [message["content"] for message in messages if message["role"] == "system" and message["content"].strip()]
    for other in [*(row[column] for column in columns[1:]), *turns[:1]]:
        if other.strip() != system.strip():
            raise RowFault(
                "conflicting system messages", f"`{columns[0]}` is {_shown(system)}, another is {_shown(other)}"
            )
    return messages if turns else [_message("system", system), *messages]


def _turns(value: Any, column: str) -> list[Message]:
    """The turns in `value`, a list or JSON, whichever of the two pairs of keys they use."""
    if isinstance(value, str):
        value = _parse(value, f"`{column}`")
    if not isinstance(value, list | tuple):
        raise RowFault("wrong type", f"`{column}` is {_shown(value)}; a list of messages is wanted")
    return [_turn(turn, number) for number, turn in enumerate(value, 1)]


def _turn(turn: Any, number: int) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = _parse(turn, f"message {number}")
    if not isinstance(turn, dict):
        raise RowFault("wrong type", f"message {number} is {_shown(turn)}; an object with role and content is wanted")
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowFault("unknown role", f"message {number} has the role {_shown(name)}; known are {', '.join(ROLES)}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls") or turn.get("function_call")
    if name == "function_call" and not calls:  # ShareGPT: the call is the value
        calls, content = content, ""
    message = _message(role, _content(content, number))
    if calls:
        if role != "assistant":
            raise RowFault("wrong type", f"message {number} ({role}) has tool calls, which only an assistant makes")
        message["tool_calls"] = _tool_calls(calls, number)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if turn.get(key) is not None:
            message[key] = _checked(turn[key], f"`{key}` of message {number}")
    train = turn.get("train")
    if train is None:  # OpenAI's name for it
        train = bool(turn["weight"]) if turn.get("weight") in (0, 1) else turn.get("weight")
    if train is not None:
        if not isinstance(train, bool):
            raise RowFault("wrong type", f"`train` (or `weight`) of message {number} is {_shown(train)}; true or false")
        message["train"] = train
    return message


def _content(content: Any, number: int) -> str:
    """Text, also where it comes as a list of parts; None is empty."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return _checked(content, f"the content of message {number}")
    texts: list[str] = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
            part = "" if part["text"] is None else part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise RowFault("unsupported content", f"message {number} has a part {_shown(kind)}; only text is trained")
        texts.append(_checked(part, f"the content of message {number}"))
    return "".join(texts)


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls as templates want them: {"type": "function", "function": {"name": ..., "arguments": {...}}}.

    OpenAI's interface has the arguments as a string of JSON, which templates would quote a second time.
    """
    where = f"the tool calls of message {number}"
    if isinstance(calls, str):
        calls = _parse(calls, where)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list | tuple) or not calls:
        raise RowFault("wrong type", f"{where} are {_shown(calls)}; a list of calls is wanted")
    wrapped = []
    for call in calls:
        call = _wrapped(call, where)
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = (
                _parse(arguments, f"the arguments of {function['name']} in message {number}") if arguments else {}
            )
        function["arguments"] = {} if arguments is None else arguments
        wrapped.append({**call, "function": function})
    _checked(json.dumps(wrapped, ensure_ascii=False, default=str), where)
    return wrapped


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = _parse(tools, "`tools`") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise RowFault("wrong type", f"`tools` is {_shown(tools)}; a list of functions is wanted")
    wrapped = [_wrapped(tool, "`tools`") for tool in tools]
    _checked(json.dumps(wrapped, ensure_ascii=False, default=str), "`tools`")
    return wrapped or None


def _wrapped(function: Any, where: str) -> dict[str, Any]:
    """A function or a call of one in the form {"type": "function", "function": {"name": ...}}, flat ones wrapped."""
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = _parse(function, where)
    if isinstance(function, dict) and "function" not in function and "name" in function:
        outer = {key: function[key] for key in ("id",) if key in function}
        flat = {key: value for key, value in function.items() if key not in ("id", "type")}
        function = {**outer, "type": "function", "function": flat}
    named = function.get("function") if isinstance(function, dict) else None
    if not isinstance(named, dict) or not isinstance(named.get("name"), str):
        raise RowFault("wrong type", f"{where}: {_shown(function)} is no object with the name of a function")
    return {"type": "function", **function}


def _needed(row: Row, column: str) -> Any:
    if column in row and row[column] is None:
        raise RowFault("empty content", f"`{column}` is null")
    if column not in row:
        names = ", ".join(f"`{name}`" for name in row) or "none"
        raise RowFault("missing column", f"no `{column}` among the columns {names}")
    return row[column]


def _text(row: Row, column: str) -> str:
    return _checked(_needed(row, column), f"`{column}`")


def _checked(text: Any, where: str) -> str:
    """`text` if it is one that can be tokenized. Raises RowFault."""
    if not isinstance(text, str):
        raise RowFault("wrong type", f"{where} is {_shown(text)}; text is wanted")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            half = f"half of a surrogate pair, \\u{ord(text[fault.start]):04x}, at character {fault.start + 1}"
            if 0xDC80 <= ord(text[fault.start]) <= 0xDCFF:  # Arrow's texts have bytes in this form
                half += f", or a byte 0x{ord(text[fault.start]) - 0xDC00:02x} that is not UTF-8"
            raise RowFault("not UTF-8", f"{where} has {half}") from fault
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        detail = f"{where}: {fault.msg} at line {fault.lineno} column {fault.colno} of {_shown(text)}"
        raise RowFault("invalid JSON", detail) from fault
    except (ValueError, RecursionError) as fault:  # a number of 5,000 digits, 100,000 brackets
        raise RowFault("invalid JSON", f"{where}: {fault}") from fault


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _is_list(value: Any) -> bool:
    """A list of turns, or the JSON of one. A prompt of prose may begin with a bracket too."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    """`value` for a message of one line: what it is, and its beginning."""
    names = {str: "the text", list: "the list", dict: "the object", bool: "", int: "the number", float: "the number"}
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f"{names.get(type(value), type(value).__name__)} {shown}".strip()
