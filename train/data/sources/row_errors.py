"""Row errors, and the checks of single values that raise them."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

ROW_ERROR_KINDS = {
    "not UTF-8": "bytes that are not UTF-8, or half of a surrogate pair, which UTF-8 can't hold",
    "invalid JSON": "a line, or a text that must be JSON, that doesn't parse",
    "invalid CSV": "quotes that don't close, or another number of cells than the header has",
    "missing column": "a column that the format needs is missing",
    "wrong type": "a number in place of a text, a text in place of a list, ...",
    "unknown role": "a role that is not in `ROLES`",
    "unsupported content": "an image or another part that is not text",
    "unsupported loss switch": "a switch that trains part of a message, or a message that is not an answer",
    "empty content": "a user or assistant message that is empty or blank, without tool calls",
    "input not read": "a text in `input` or `context` beside the columns of Janus, which don't use it",
    "text not read": "a text that a data generation pipeline would leave out",
    "conflicting values": "two columns or two keys of a message with the same meaning and different values",
    "conflicting system messages": "a system column that differs from the system turn",
    "no assistant turn": "nothing to train",
    "identical answers": "a pair whose chosen and rejected answers are the same, so there is nothing to learn",
    "different prompts": "a pair whose conversations differ before their answers, or whose prompt ends in an answer",
}
"""Every kind of error that is found before a template is involved, and its meaning."""

PYTHON = "a Python list or dict (single quotes, None, True), not JSON"
_PYTHON_START = re.compile(r"\s*(\[\s*)?\{\s*'")
_PREVIEW = 60
"""Characters of a value in a message."""


class RowError(Exception):
    """The reason why one row can't be trained: `kind` is shared by many rows, `detail` describes this one.

    Errors of reading have a kind of `ROW_ERROR_KINDS`; templates and loss masks add kinds of their own.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.kind, self.detail)


def is_blank(value: Any) -> bool:
    """Return whether a value is null, an empty list or object, or an empty or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def first_filled(values: Mapping[str, Any], keys: Sequence[str], where: str = "") -> str | None:
    """Return the first of `keys` (names of one thing) whose value is not blank, or None.

    Raises RowError if another of them has a different value.
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
                "conflicting values", f"{where}`{first}` is {preview(values[first])}, and `{key}` is {preview(value)}"
            )
    return first


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def check_text(text: Any, where: str) -> str:
    """Return `text`. Raises RowError if it is not a text, or can't be encoded as UTF-8."""
    if not isinstance(text, str):
        raise RowError("wrong type", f"{where} is {preview(text)}; it must be a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start + 1}"
            if 0xDC80 <= ord(text[error.start]) <= 0xDCFF:  # surrogateescape, as sources.arrow decodes bytes
                half += f", or a byte 0x{ord(text[error.start]) - 0xDC00:02x} that is not UTF-8"
            raise RowError("not UTF-8", f"{where} has {half}") from error
    return text


def parse_json(text: str, where: str) -> Any:
    """Parse a text of JSON. Raises RowError, which names it as `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if is_python(text) or _PYTHON_START.match(text):  # NumPy's lists have no commas, long ones "..."
            raise RowError("invalid JSON", f"{where} is {PYTHON}: {preview(text)}. Write it with json.dumps") from error
        detail = f"{where}: {error.msg} at line {error.lineno} column {error.colno} of {preview(text)}"
        raise RowError("invalid JSON", detail) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise RowError("invalid JSON", f"{where}: {error}") from error


def is_python(text: str) -> bool:
    """Return whether a text that is not JSON is a dict or list in Python's notation."""
    if not _PYTHON_START.match(text) and not re.search(r": (None|True|False)\b", text):
        return False
    try:
        return isinstance(ast.literal_eval(text.strip().removesuffix(",")), dict | list)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


@singledispatch
def preview(value: Any) -> str:
    """Return the type and the beginning of a value, for a message of one line."""
    names = {str: "the text", list: "the list", dict: "the object", bool: "", int: "the number", float: "the number"}
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    text = text if len(text) <= _PREVIEW else text[:_PREVIEW] + "..."
    return f"{names.get(type(value), type(value).__name__)} {text}".strip()
