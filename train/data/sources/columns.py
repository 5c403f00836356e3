"""Columns that several formats read: system message, tools, variables of the template, questions, history."""

import json
from typing import Any

from train.data.sources.row_errors import RowError, check_text, first_filled, parse_json, preview
from train.data.sources.turns import Message, new_message, read_tools

RawRow = dict[str, Any]

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "system_content")
TOOL_COLUMNS = ("tools", "functions", "available_tools")
TEMPLATE_KWARGS = "chat_template_kwargs"
CONTEXTS = ("input", "context")
_TOOLS_OR_KWARGS = frozenset((*TOOL_COLUMNS, TEMPLATE_KWARGS))
_RESERVED = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversations", "messages"),
        *("return_assistant_tokens_mask", "tokenize"),
    )
)
"""Variables of rendering that a row may not set."""


def with_system_column(row: RawRow, messages: list[Message]) -> list[Message]:
    """Return the messages with the system message of a column as the first. Raises RowError if two differ."""
    columns = [column for column in SYSTEM_COLUMNS if row.get(column) is not None and require_text(row, column).strip()]
    if not columns:
        return messages
    system: str = row[columns[0]]
    turns = [message["content"] for message in messages if message["role"] == "system" and message["content"].strip()]
    for other in [*(row[column] for column in columns[1:]), *turns[:1]]:
        if other.strip() != system.strip():
            raise RowError(
                "conflicting system messages", f"`{columns[0]}` is {preview(system)}, another is {preview(other)}"
            )
    return messages if turns else [new_message("system", system), *messages]


def tools_of(row: RawRow) -> list[dict[str, Any]] | None:
    """Return the tool definitions of a row, or None. Raises RowError."""
    if row.keys().isdisjoint(_TOOLS_OR_KWARGS):
        return None
    given = {column: tools for column in TOOL_COLUMNS if (tools := read_tools(row.get(column), column))}
    name = f"{TEMPLATE_KWARGS}.tools"
    if tools := read_tools((_template_kwargs(row) or {}).get("tools"), name):
        given[name] = tools
    column = first_filled(given, tuple(given)) if given else None
    return given[column] if column else None


def read_variables(row: RawRow) -> dict[str, Any] | None:
    """Return the variables that a row sets for the template, tools aside; None if it sets none. Raises RowError."""
    return {key: value for key, value in (_template_kwargs(row) or {}).items() if key != "tools"} or None


def _template_kwargs(row: RawRow) -> dict[str, Any] | None:
    kwargs = row.get(TEMPLATE_KWARGS)
    if isinstance(kwargs, str):
        kwargs = parse_json(kwargs, f"`{TEMPLATE_KWARGS}`") if kwargs.strip() else None
    if not kwargs:
        return None
    if not isinstance(kwargs, dict):
        raise RowError("wrong type", f"`{TEMPLATE_KWARGS}` is {preview(kwargs)}; it must be an object")
    reserved = _RESERVED.intersection(kwargs)
    if reserved:
        raise RowError("wrong type", f"`{TEMPLATE_KWARGS}` sets {min(reserved)}, which a row can't decide")
    check_text(json.dumps(kwargs, ensure_ascii=False, default=str), f"`{TEMPLATE_KWARGS}`")
    return kwargs


def choose_column(row: RawRow, columns: tuple[str, ...]) -> str:
    """Return the first of these columns with a text, else the first that exists. Raises RowError if two differ."""
    existing = [column for column in columns if column in row]
    given = [column for column in existing if row[column] is not None]
    return first_filled(row, columns) or (given or existing or list(columns))[0]


def with_context(row: RawRow, question: str) -> str:
    """Return the question and, on the next line, its context."""
    column = first_filled(row, CONTEXTS)
    if column is None:
        return question
    return f"{question}\n{require_text(row, column)}" if question.strip() else require_text(row, column)


def read_history(row: RawRow) -> list[Message]:
    """Return the turns of `history`, a list of pairs."""
    history = row.get("history") or []
    messages: list[Message] = []
    if isinstance(history, str):
        history = parse_json(history, "`history`")
    if not isinstance(history, list):
        raise RowError(
            "wrong type", f"`history` is {preview(history)}; it must be a list of pairs of question and answer"
        )
    for number, pair in enumerate(history, 1):
        texts = ["" if text is None else text for text in pair] if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowError("wrong type", f"`history` item {number} is {preview(pair)}; it must be [question, answer]")
        messages += [new_message(role, text) for role, text in zip(("user", "assistant"), texts, strict=True)]
    return messages


def require(row: RawRow, column: str) -> Any:
    """Return the value of a column. Raises RowError if it is missing or null."""
    if column in row and row[column] is None:
        raise RowError("empty content", f"`{column}` is null")
    if column not in row:
        names = ", ".join(f"`{name}`" for name in row) or "none"
        raise RowError("missing column", f"no `{column}` among the columns {names}")
    return row[column]


def require_text(row: RawRow, column: str) -> str:
    """Return the text of a column. Raises RowError."""
    return check_text(require(row, column), f"`{column}`")


def is_list_of_turns(value: Any) -> bool:
    """Return whether a value is a list of turns or its JSON. A prompt of prose may begin with a bracket too."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return isinstance(value, list | tuple)
