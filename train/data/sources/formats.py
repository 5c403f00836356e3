"""Rows as data sets have them -> messages as chat templates take them.

| format            | columns                                                                                          |
|-------------------|--------------------------------------------------------------------------------------------------|
| messages          | `messages`: turns of role and content                                                            |
| sharegpt          | `conversations`: turns of from and value                                                         |
| prompt_completion | `prompt` and `completion`: strings, or lists of turns                                            |
| janus             | `prompt` (older: `user_prompt`, `instruction`) and `output`                                      |
| alpaca            | `instruction`, `output`; `input` (or `context`) where given                                      |
| question_answer   | `question`, `query` or `instruction`, and `answer` or `response`; `input` or `context`           |
| exchanges         | `conversation`: exchanges of input and output (Capybara), or turns of role and content (LMSYS)  |

Beside each of them: a system message (`SYSTEM_COLUMNS`), which becomes the first message; definitions of tools
(`TOOL_COLUMNS`: a list, or JSON; OpenAI's older form without the wrapper too); `chat_template_kwargs`, which the
template gets as variables, as TRL does it. Beside janus, alpaca and question_answer: `history`, pairs of question and
answer. `input` and `context` (Dolly) follow the question in the user turn, on a line of their own. Anything that is a
list of turns or tools may be a string of JSON, as CSV has it. Two columns that mean the same and differ are a fault.
Other columns, and other keys of messages (`train.data.sources.turns`), are collected in `unread`.

A message keeps role, content, tool_calls, name, tool_call_id, reasoning_content and train. Text is never trimmed or
changed. System messages that are empty or blank are left out; any other stays where it stands, or the row is a fault.
Turns after the last answer are kept: nothing in them is trained.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from train.data.sources.row_errors import ROW_ERROR_KINDS as ROW_ERROR_KINDS
from train.data.sources.row_errors import RowError as RowError
from train.data.sources.row_errors import checked, filled, parsed, shown
from train.data.sources.turns import ROLES as ROLES
from train.data.sources.turns import TURN_KEYS, new_message, read_tools, read_turns
from train.data.sources.turns import Message as Message
from train.data.sources.unread_text import Unread, collect
from train.errors import UserError

RawRow = dict[str, Any]

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "system_content")
TOOL_COLUMNS = ("tools", "functions", "available_tools")
TEMPLATE_KWARGS = "chat_template_kwargs"
_JANUS_PROMPTS = ("prompt", "user_prompt", "instruction")
_QUESTIONS = ("question", "query", "instruction")
_ANSWERS = ("answer", "response")
_CONTEXTS = ("input", "context")
_BESIDE = frozenset((*SYSTEM_COLUMNS, *TOOL_COLUMNS, TEMPLATE_KWARGS))
_READ = {
    "messages": _BESIDE | {"messages"},
    "sharegpt": _BESIDE | {"conversations"},
    "prompt_completion": _BESIDE | {"prompt", "completion"},
    "janus": _BESIDE.union(_JANUS_PROMPTS, _CONTEXTS, {"output", "history"}),
    "alpaca": _BESIDE.union(_CONTEXTS, {"instruction", "output", "history"}),
    "question_answer": _BESIDE.union(_QUESTIONS, _ANSWERS, _CONTEXTS, {"history"}),
    "exchanges": _BESIDE | {"conversation"},
}
"""The columns that each format reads; any other is collected in `unread`."""
_TOOLS_OR_KWARGS = frozenset((*TOOL_COLUMNS, TEMPLATE_KWARGS))
_COLUMNS = frozenset().union(*_READ.values())
_TURN_COLUMNS = ("messages", "conversations", "prompt", "completion")
_RESERVED = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversations", "messages"),
        *("return_assistant_tokens_mask", "tokenize"),
    )
)
"""Arguments of rendering that are ours to decide, so that no row can."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row as chat templates take it.

    `messages`: role and content, with tool_calls, name, tool_call_id, reasoning_content and train (false: this turn is
    not trained) where given. `place`: where in its file it stands, ":12" or " row 12"; lines and rows count from 1.
    `template_kwargs`: variables that this row sets for the template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    place: str
    template_kwargs: dict[str, Any] | None = None


def detect(columns: Iterable[str]) -> str:
    """The format that these columns mean. Where several would do, the first of the table above.

    `instruction` and `output` are Janus's older columns where a system column stands beside them and no `input`,
    `context` or `history` does; both ways of reading them then give the same messages.
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
        older = any(column in found for column in SYSTEM_COLUMNS) and not {*_CONTEXTS, "history"} & found.keys()
        if {"instruction", "input"} <= found.keys():  # Code Alpaca has the rendered prompt beside them
            return "alpaca"
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
        "`input`, `output`), question_answer (`question`, `answer`), exchanges (`conversation`). Rename the "
        "columns."
    )


def read_row(
    row: RawRow,
    format: str,
    place: str,
    *,
    ignore: Collection[str] = (),
    answers_needed: bool = True,
    unread: Unread | None = None,
) -> Conversation:
    """Return `row`, read as `format` (one that `detect` gives). Raises RowFault.

    `ignore`: columns and keys of messages (`data.sources.N.ignore`), read as if the row had none of them. `unread`: is
    given what nothing read, what was ignored included. `answers_needed`: as of `convert`.
    """
    unread = {} if unread is None else unread
    row = without(row, ignore, unread)
    messages, tools = convert(row, format, answers_needed=answers_needed, unread=unread)
    kwargs = {key: value for key, value in (_template_kwargs(row) or {}).items() if key != "tools"}
    return Conversation(messages, tools, place, kwargs or None)


def convert(
    row: RawRow, format: str, *, answers_needed: bool = True, unread: Unread | None = None
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages and tools of `row`, read as `format` (one that `detect` gives). Raises RowFault.

    `answers_needed`: whether a row without an answer to train is at fault, or one with an empty answer. `unread`: is
    given the values that nothing read.
    """
    unread = {} if unread is None else unread
    messages = _with_system_column(row, _READERS[format](row, unread))
    for column in row.keys() - _READ[format]:
        collect(unread, str(column), row[column])  # a pickled data frame may have numbers for names
    tools = _tools(row)
    kept: list[Message] = []
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and not message.get("tool_calls"):
            if message["role"] == "system":
                continue
            may_be_empty = message["role"] == "tool" or (message["role"] == "assistant" and not answers_needed)
            if not may_be_empty:
                raise RowError("empty content", f"message {number} ({message['role']}) is empty or blank")
        kept.append(message)
    if not answers_needed:
        return kept, tools
    answers = [message for message in kept if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in kept[:8]) or "none"
        raise RowError("no assistant turn", f"the roles are: {roles}")
    if not any(message.get("train", True) for message in answers):
        raise RowError("no assistant turn", "every one says that it is not to be trained")
    return kept, tools


def ignored_when_read(ignore: Collection[str]) -> list[str]:
    """Return those of the names that would be read if they were not ignored: the others change no token."""
    return sorted(
        name for name in ignore if name in _COLUMNS or ("[]." in name and name.partition("[].")[2] in TURN_KEYS)
    )


def without(row: RawRow, ignore: Collection[str], unread: Unread) -> RawRow:
    """Return `row` without the columns and keys of messages in `ignore`; their values are collected in `unread`."""
    names = ignored_when_read(ignore) if ignore else []
    if not names:
        return row
    row = dict(row)
    for name in names:
        column, within, key = name.partition("[].")
        if not within:
            collect(unread, name, row.pop(name, None))
            continue
        for turns_column in (column,) if column in row else _TURN_COLUMNS:  # templates name all of them messages
            value: Any = row.get(turns_column)
            if is_list_of_turns(value):
                turns = json.loads(value) if isinstance(value, str) else value
                row[turns_column] = [
                    {other: turn[other] for other in turn if other != key} if isinstance(turn, dict) else turn
                    for turn in turns
                ]
                for turn in turns:
                    collect(unread, name, turn.get(key) if isinstance(turn, dict) else None)
    return row


def _from_turns(column: str) -> Callable[[RawRow, Unread], list[Message]]:
    def read(row: RawRow, unread: Unread) -> list[Message]:
        return read_turns(_needed(row, column), column, unread)

    return read


def _from_prompt_and_completion(row: RawRow, unread: Unread) -> list[Message]:
    parts = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = _needed(row, column)
        parts.append(
            read_turns(value, column, unread) if is_list_of_turns(value) else [new_message(role, _text(row, column))]
        )
    before, after = parts
    for turn in before:
        if turn["role"] == "assistant":
            turn.setdefault("train", False)  # of this format only the completion is trained, as in TRL
    return before + after


def _from_janus(row: RawRow, unread: Unread) -> list[Message]:
    question = _first(row, _JANUS_PROMPTS)
    for column in _CONTEXTS:
        if row.get(column) is not None and _text(row, column).strip():
            remedy = (
                "write `format: alpaca`, which reads it after `instruction`, or take the column out"
                if question == "instruction"
                else f"rename `{question}` to `instruction` (the format alpaca, which reads it after that), or take "
                "the column out with `ignore`"
            )
            raise RowError("input not read", f"`{column}` is {shown(row[column])}: {remedy}")
    return [*_history(row), new_message("user", _text(row, question)), new_message("assistant", _text(row, "output"))]


def _from_alpaca(row: RawRow, unread: Unread) -> list[Message]:
    question = _with_context(row, _text(row, "instruction"))
    return [*_history(row), new_message("user", question), new_message("assistant", _text(row, "output"))]


def _from_question_and_answer(row: RawRow, unread: Unread) -> list[Message]:
    question = _with_context(row, _text(row, _first(row, _QUESTIONS)))
    return [*_history(row), new_message("user", question), new_message("assistant", _text(row, _first(row, _ANSWERS)))]


def _with_context(row: RawRow, question: str) -> str:
    """Return the question and, on the next line, what it is about."""
    column = filled(row, _CONTEXTS)
    if column is None:
        return question
    return f"{question}\n{_text(row, column)}" if question.strip() else _text(row, column)


def _history(row: RawRow) -> list[Message]:
    """Return the turns of `history`, a list of pairs."""
    history = row.get("history") or []
    messages: list[Message] = []
    if isinstance(history, str):
        history = parsed(history, "`history`")
    if not isinstance(history, list):
        raise RowError("wrong type", f"`history` is {shown(history)}; pairs of question and answer are wanted")
    for number, pair in enumerate(history, 1):
        texts = ["" if text is None else text for text in pair] if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowError("wrong type", f"`history` item {number} is {shown(pair)}; [question, answer] is wanted")
        messages += [new_message(role, text) for role, text in zip(("user", "assistant"), texts, strict=True)]
    return messages


def _from_exchanges(row: RawRow, unread: Unread) -> list[Message]:
    exchanges = _needed(row, "conversation")
    if isinstance(exchanges, str):
        exchanges = parsed(exchanges, "`conversation`")
    if isinstance(exchanges, list | tuple) and exchanges and all(_is_turn(one) for one in exchanges):
        return read_turns(exchanges, "conversation", unread)  # WildChat, LMSYS-Chat-1M
    messages = []
    for exchange in exchanges if isinstance(exchanges, list | tuple) else (exchanges,):
        if not isinstance(exchange, dict):
            wanted = "a list of objects with input and output is wanted"
            raise RowError("wrong type", f"`conversation` holds {shown(exchange)}; {wanted}")
        answer = "" if "output" in exchange and exchange["output"] is None else _text(exchange, "output")
        messages += [new_message("user", _text(exchange, "input")), new_message("assistant", answer)]
        for key in exchange.keys() - {"input", "output"}:
            collect(unread, f"conversation[].{key}", exchange[key])
    return messages


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("role", "from")) and "input" not in value


_READERS: dict[str, Callable[[RawRow, Unread], list[Message]]] = {
    "messages": _from_turns("messages"),
    "sharegpt": _from_turns("conversations"),
    "prompt_completion": _from_prompt_and_completion,
    "janus": _from_janus,
    "alpaca": _from_alpaca,
    "question_answer": _from_question_and_answer,
    "exchanges": _from_exchanges,
}


def _with_system_column(row: RawRow, messages: list[Message]) -> list[Message]:
    columns = [column for column in SYSTEM_COLUMNS if row.get(column) is not None and _text(row, column).strip()]
    if not columns:
        return messages
    system: str = row[columns[0]]
    turns = [message["content"] for message in messages if message["role"] == "system" and message["content"].strip()]
    for other in [*(row[column] for column in columns[1:]), *turns[:1]]:
        if other.strip() != system.strip():
            raise RowError(
                "conflicting system messages", f"`{columns[0]}` is {shown(system)}, another is {shown(other)}"
            )
    return messages if turns else [new_message("system", system), *messages]


def _tools(row: RawRow) -> list[dict[str, Any]] | None:
    if row.keys().isdisjoint(_TOOLS_OR_KWARGS):
        return None
    given = {column: tools for column in TOOL_COLUMNS if (tools := read_tools(row.get(column), column))}
    name = f"{TEMPLATE_KWARGS}.tools"
    if tools := read_tools((_template_kwargs(row) or {}).get("tools"), name):
        given[name] = tools
    column = filled(given, tuple(given)) if given else None
    return given[column] if column else None


def _template_kwargs(row: RawRow) -> dict[str, Any] | None:
    """Return the variables that a row sets for the template, None where it sets none. Raises RowFault."""
    kwargs = row.get(TEMPLATE_KWARGS)
    if isinstance(kwargs, str):
        kwargs = parsed(kwargs, f"`{TEMPLATE_KWARGS}`") if kwargs.strip() else None
    if not kwargs:
        return None
    if not isinstance(kwargs, dict):
        raise RowError("wrong type", f"`{TEMPLATE_KWARGS}` is {shown(kwargs)}; an object is wanted")
    reserved = _RESERVED.intersection(kwargs)
    if reserved:
        raise RowError("wrong type", f"`{TEMPLATE_KWARGS}` sets {min(reserved)}, which a row can't decide")
    checked(json.dumps(kwargs, ensure_ascii=False, default=str), f"`{TEMPLATE_KWARGS}`")
    return kwargs


def _first(row: RawRow, columns: tuple[str, ...]) -> str:
    """Return the column of these that has a text, or else the one that is there. Raises RowFault where two differ."""
    there = [column for column in columns if column in row]
    given = [column for column in there if row[column] is not None]
    return filled(row, columns) or (given or there or list(columns))[0]


def _needed(row: RawRow, column: str) -> Any:
    if column in row and row[column] is None:
        raise RowError("empty content", f"`{column}` is null")
    if column not in row:
        names = ", ".join(f"`{name}`" for name in row) or "none"
        raise RowError("missing column", f"no `{column}` among the columns {names}")
    return row[column]


def _text(row: RawRow, column: str) -> str:
    return checked(_needed(row, column), f"`{column}`")


def is_list_of_turns(value: Any) -> bool:
    """Return whether a value is a list of turns, or the JSON of one. A prompt of prose may begin with a bracket too."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return isinstance(value, list | tuple)
