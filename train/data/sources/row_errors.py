"""Faults of rows, and the checks of single values that raise them."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

ROW_ERROR_KINDS = {
    "not UTF-8": "bytes that are no UTF-8, or half of a surrogate pair, which no UTF-8 can hold",
    "invalid JSON": "a line, or a text where JSON is wanted, that doesn't parse",
    "invalid CSV": "quotes that don't close, or not as many cells as the header names",
    "missing column": "a column that the format needs isn't there",
    "wrong type": "a number where a text is wanted, a text where a list is, ...",
    "unknown role": "none of the roles in `ROLES`",
    "unsupported content": "an image or another part that is no text",
    "unsupported loss switch": "a switch that trains part of a message, or a message that is no answer",
    "empty content": "a user or assistant message of nothing or of blanks, without tool calls",
    "input not read": "a text in `input` or `context` beside the columns of Janus, which have no place for it",
    "text not read": "a text that a pipeline which asks models would leave out",
    "conflicting values": "two columns or two keys of a message have the same meaning and different values",
    "conflicting system messages": "the system column says something else than the system turn",
    "no assistant turn": "nothing that could be trained",
}
"""Every kind of fault found before a template is involved, and what it means."""

PYTHON = "a Python list or dict (single quotes, None, True), not JSON"
_PYTHON_START = re.compile(r"\s*(\[\s*)?\{\s*'")
_SHOWN = 60


class RowError(Exception):
    """Reason why one row can't be trained: `kind` is shared by many rows, `detail` says what is wrong with this one.

    Faults of this package's reading have a kind of `ROW_ERROR_KINDS`; templates and masks add their own.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.kind, self.detail)


def is_blank(value: Any) -> bool:
    """Return whether a value holds nothing: null, an empty list or object, a text of blanks."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def filled(values: Mapping[str, Any], keys: Sequence[str], where: str = "") -> str | None:
    """Return the first of `keys`, which have the same meaning, whose value is not blank; None where there is none.

    Raises RowFault where another of them has a different value.
    """
    first: str | None = None
    for key in keys:
        value = values.get(key)
        if value is None or is_blank(value):
            continue
        if first is None:
            first = key
        elif _stripped(value) != _stripped(values[first]):
            raise RowError(
                "conflicting values", f"{where}`{first}` is {shown(values[first])}, and `{key}` is {shown(value)}"
            )
    return first


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def checked(text: Any, where: str) -> str:
    """Return `text` if it is one that can be tokenized. Raises RowFault."""
    if not isinstance(text, str):
        raise RowError("wrong type", f"{where} is {shown(text)}; text is wanted")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            half = f"half of a surrogate pair, \\u{ord(text[fault.start]):04x}, at character {fault.start + 1}"
            if 0xDC80 <= ord(text[fault.start]) <= 0xDCFF:  # Arrow's texts have bytes in this form
                half += f", or a byte 0x{ord(text[fault.start]) - 0xDC00:02x} that is not UTF-8"
            raise RowError("not UTF-8", f"{where} has {half}") from fault
    return text


def parsed(text: str, where: str) -> Any:
    """Return the value of a text of JSON. Raises RowFault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        if is_python(text) or _PYTHON_START.match(text):  # NumPy's lists have no commas, long ones "..."
            raise RowError("invalid JSON", f"{where} is {PYTHON}: {shown(text)}. Write it with json.dumps") from fault
        detail = f"{where}: {fault.msg} at line {fault.lineno} column {fault.colno} of {shown(text)}"
        raise RowError("invalid JSON", detail) from fault
    except (ValueError, RecursionError) as fault:  # a number of 5,000 digits, 100,000 brackets
        raise RowError("invalid JSON", f"{where}: {fault}") from fault


def is_python(text: str) -> bool:
    """Return whether a text that is not JSON is a dict or list as Python prints it."""
    if not _PYTHON_START.match(text) and not re.search(r": (None|True|False)\b", text):
        return False
    try:
        return isinstance(ast.literal_eval(text.strip().removesuffix(",")), dict | list)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


@singledispatch
def shown(value: Any) -> str:
    """Return `value` for a message of one line: its type and its beginning."""
    names = {str: "the text", list: "the list", dict: "the object", bool: "", int: "the number", float: "the number"}
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f"{names.get(type(value), type(value).__name__)} {text}".strip()
