"""Formats: rows as data sets have them -> messages as chat templates take them.

| format            | columns                                                                                          |
|-------------------|--------------------------------------------------------------------------------------------------|
| messages          | `messages`: turns of role and content                                                            |
| sharegpt          | `conversations`: turns of from and value                                                         |
| prompt_completion | `prompt` and `completion`: strings, or lists of turns                                            |
| janus             | `prompt` (older: `user_prompt`, `instruction`) and `output`                                      |
| alpaca            | `instruction`, `output`; optional `input` or `context`                                           |
| question_answer   | `question`, `query` or `instruction`, and `answer` or `response`; optional `input` or `context`  |
| exchanges         | `conversation`: exchanges of input and output (Capybara), or turns of role and content (LMSYS)   |

All formats also read a system message (`SYSTEM_COLUMNS`), which becomes the first message; tool definitions
(`TOOL_COLUMNS`: a list or its JSON, also in OpenAI's older form without the wrapper); `loss_weight`, a number; and
`chat_template_kwargs`, which are variables of the template, as in TRL. janus, alpaca and question_answer also read
`history`, pairs of question and answer. `input` and `context` (Dolly) follow the question in the user turn, on a new
line. A list of turns or tools may be a JSON string, as in CSV. Two columns of the same meaning that differ are a row
error. Other columns, and other keys of messages (`train.data.sources.turns`), are collected in `unread`. Pairs of
answers are read by `train.data.sources.pairs`.

A message keeps role, content, tool_calls, name, tool_call_id, reasoning_content, train and loss_weight. Text is never
trimmed or changed. An empty or blank system message is left out; any other stays at its position, or the row is an
error. Turns after the last answer are kept, untrained.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from train.data.sources.columns import (
    CONTEXTS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    choose_column,
    is_list_of_turns,
    read_history,
    read_variables,
    require,
    require_text,
    tools_of,
    with_context,
    with_system_column,
)
from train.data.sources.columns import TEMPLATE_KWARGS as TEMPLATE_KWARGS
from train.data.sources.columns import RawRow as RawRow
from train.data.sources.loss_weights import LOSS_WEIGHT, apply_row_weight, weight_of
from train.data.sources.row_errors import ROW_ERROR_KINDS as ROW_ERROR_KINDS
from train.data.sources.row_errors import RowError as RowError
from train.data.sources.row_errors import parse_json, preview
from train.data.sources.turns import ROLES as ROLES
from train.data.sources.turns import TURN_KEYS, new_message, read_turns
from train.data.sources.turns import Message as Message
from train.data.sources.unread_text import Unread, collect
from train.errors import UserError

_JANUS_PROMPTS = ("prompt", "user_prompt", "instruction")
_QUESTIONS = ("question", "query", "instruction")
_ANSWERS = ("answer", "response")
BESIDE = frozenset((*SYSTEM_COLUMNS, *TOOL_COLUMNS, TEMPLATE_KWARGS, LOSS_WEIGHT))
"""Columns that all formats read."""
_READ = {
    "messages": BESIDE | {"messages"},
    "sharegpt": BESIDE | {"conversations"},
    "prompt_completion": BESIDE | {"prompt", "completion"},
    "janus": BESIDE.union(_JANUS_PROMPTS, CONTEXTS, {"output", "history"}),
    "alpaca": BESIDE.union(CONTEXTS, {"instruction", "output", "history"}),
    "question_answer": BESIDE.union(_QUESTIONS, _ANSWERS, CONTEXTS, {"history"}),
    "exchanges": BESIDE | {"conversation"},
}
"""Format -> the columns that it reads; any other is collected in `unread`."""
_COLUMNS = frozenset().union(*_READ.values())
_TURN_COLUMNS = ("messages", "conversations", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row as chat templates take it.

    - `messages`: role and content, and where given tool_calls, name, tool_call_id, reasoning_content, train (false:
      the turn is not trained) and loss_weight (the row's own included).
    - `place`: the position in its file, ":12" or " row 12"; lines and rows count from 1.
    - `template_kwargs`: variables that the row sets for the template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    place: str
    template_kwargs: dict[str, Any] | None = None


def detect(columns: Iterable[str]) -> str:
    """Return the format with these columns: the first of the table above that fits.

    `instruction` and `output` are Janus's older columns if a system column is beside them and no `input`, `context` or
    `history`; janus and alpaca then give the same messages.
    Raises UserError if no format fits.
    """
    names = dict.fromkeys(columns)  # in their order, for the message
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if {"prompt", "completion"} <= names.keys():
        return "prompt_completion"
    if "output" in names:
        older = any(column in names for column in SYSTEM_COLUMNS) and not {*CONTEXTS, "history"} & names.keys()
        if {"instruction", "input"} <= names.keys():  # Code Alpaca has the rendered prompt beside them
            return "alpaca"
        if "prompt" in names or "user_prompt" in names or ("instruction" in names and older):
            return "janus"
        if "instruction" in names:
            return "alpaca"
    if any(column in names for column in _QUESTIONS) and any(column in names for column in _ANSWERS):
        return "question_answer"
    if "conversation" in names:
        return "exchanges"
    shown = ", ".join(f"`{column}`" for column in names) or "none"
    remedy = "Rename the columns."
    if {"chosen", "rejected"} <= names.keys():
        remedy = "Pairs of a chosen and a rejected answer need the section `preference`, such as {loss: dpo}."
    raise UserError(
        f"no known format has these columns: {shown}. The formats are: messages (`messages`), sharegpt "
        "(`conversations`), prompt_completion (`prompt`, `completion`), janus (`system`, `prompt`, `output`), alpaca "
        "(`instruction`, `input`, `output`), question_answer (`question`, `answer`), exchanges (`conversation`). "
        f"{remedy}"
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
    """Return the conversation of a row in `format` (see `detect`). Raises RowError.

    - `ignore`: columns and message keys (`data.sources.N.ignore`), read as if the row had none of them.
    - `unread`: receives the values that were not read, ignored ones included.
    - `answers_needed`: see `convert`.
    """
    unread = {} if unread is None else unread
    row = without(row, ignore, unread)
    messages, tools = convert(row, format, answers_needed=answers_needed, unread=unread)
    return Conversation(messages, tools, place, read_variables(row))


def convert(
    row: RawRow, format: str, *, answers_needed: bool = True, unread: Unread | None = None
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Return the messages and tools of a row in `format` (see `detect`). Raises RowError.

    - `answers_needed`: a row without an answer to train, or with an empty answer, is an error.
    - `unread`: receives the values that were not read.
    """
    unread = {} if unread is None else unread
    return complete(row, _READERS[format](row, unread), _READ[format], unread, answers_needed=answers_needed)


def complete(
    row: RawRow, messages: list[Message], columns: Collection[str], unread: Unread, *, answers_needed: bool = True
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Return the messages and tools of a row, whose other messages are given; check them. Raises RowError.

    - `messages`: those that were read from columns of their own.
    - `columns`: the columns that are read; the values of the others are collected in `unread`.
    - `answers_needed`: see `convert`.
    """
    messages = with_system_column(row, messages)
    for column in row.keys() - columns:
        collect(unread, str(column), row[column])  # a pickled data frame may have numbers for names
    tools = tools_of(row)
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
    if not any(map(weight_of, answers)):
        raise RowError("no assistant turn", "each has a loss switch that turns it off")
    apply_row_weight(row.get(LOSS_WEIGHT), answers)
    return kept, tools


def select_read_names(ignore: Collection[str]) -> list[str]:
    """Return the ignored names that would be read otherwise; the others change no token."""
    return sorted(
        name for name in ignore if name in _COLUMNS or ("[]." in name and name.partition("[].")[2] in TURN_KEYS)
    )


def without(row: RawRow, ignore: Collection[str], unread: Unread) -> RawRow:
    """Return `row` without the columns and message keys in `ignore`; their values are collected in `unread`."""
    names = select_read_names(ignore) if ignore else []
    if not names:
        return row
    row = dict(row)
    for name in names:
        column, separator, key = name.partition("[].")
        if not separator:
            collect(unread, name, row.pop(name, None))
            continue
        for turns_column in (column,) if column in row else _TURN_COLUMNS:  # reports name all of them messages
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
        return read_turns(require(row, column), column, unread)

    return read


def _from_prompt_and_completion(row: RawRow, unread: Unread) -> list[Message]:
    parts = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = require(row, column)
        parts.append(
            read_turns(value, column, unread)
            if is_list_of_turns(value)
            else [new_message(role, require_text(row, column))]
        )
    before, after = parts
    for turn in before:
        if turn["role"] == "assistant":
            turn.setdefault("train", False)  # only the completion is trained, as in TRL
    return before + after


def _from_janus(row: RawRow, unread: Unread) -> list[Message]:
    question = choose_column(row, _JANUS_PROMPTS)
    for column in CONTEXTS:
        if row.get(column) is not None and require_text(row, column).strip():
            remedy = (
                "write `format: alpaca`, which reads it after `instruction`, or take the column out"
                if question == "instruction"
                else f"rename `{question}` to `instruction` (the format alpaca, which reads it after that), or take "
                "the column out with `ignore`"
            )
            raise RowError("input not read", f"`{column}` is {preview(row[column])}: {remedy}")
    return [
        *read_history(row),
        new_message("user", require_text(row, question)),
        new_message("assistant", require_text(row, "output")),
    ]


def _from_alpaca(row: RawRow, unread: Unread) -> list[Message]:
    question = with_context(row, require_text(row, "instruction"))
    return [*read_history(row), new_message("user", question), new_message("assistant", require_text(row, "output"))]


def _from_question_and_answer(row: RawRow, unread: Unread) -> list[Message]:
    question = with_context(row, require_text(row, choose_column(row, _QUESTIONS)))
    return [
        *read_history(row),
        new_message("user", question),
        new_message("assistant", require_text(row, choose_column(row, _ANSWERS))),
    ]


def _from_exchanges(row: RawRow, unread: Unread) -> list[Message]:
    exchanges = require(row, "conversation")
    if isinstance(exchanges, str):
        exchanges = parse_json(exchanges, "`conversation`")
    if isinstance(exchanges, list | tuple) and exchanges and all(map(_is_turn, exchanges)):
        return read_turns(exchanges, "conversation", unread)  # WildChat, LMSYS-Chat-1M
    messages = []
    for exchange in exchanges if isinstance(exchanges, list | tuple) else (exchanges,):
        if not isinstance(exchange, dict):
            expected = "it must be a list of objects with input and output"
            raise RowError("wrong type", f"`conversation` holds {preview(exchange)}; {expected}")
        answer = "" if "output" in exchange and exchange["output"] is None else require_text(exchange, "output")
        messages += [new_message("user", require_text(exchange, "input")), new_message("assistant", answer)]
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
