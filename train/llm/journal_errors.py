"""Faults of a journal's file: damage, locks, an empty file beside written rows."""

import sqlite3
import sys
from pathlib import Path
from types import NoneType
from typing import Any

from train.errors import UserError

READING = "answers can't be read from it"
WRONG_TYPE = sqlite3.DatabaseError("a column holds a value of another type")
"""The error of a damaged record: a flipped bit in its header makes another type of a column."""
WRONG_TYPE.sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def are_of_the_columns(
    text: Any, finish_reason: Any, refusal: Any, prompt_tokens: Any, completion_tokens: Any, seconds: Any, limit: Any
) -> bool:
    """Return whether the values of an answer have the types of their columns."""
    return (
        type(text) is type(finish_reason) is str
        and type(refusal) in (str, NoneType)
        and type(prompt_tokens) in (int, NoneType)
        and type(completion_tokens) in (int, NoneType)
        and type(seconds) is float
        and type(limit) is int
    )


def warn_of_empty(path: Path) -> None:
    """Print a warning where a new journal begins beside rows that are written."""
    if any(path.parent.glob("data/*")):
        print(
            f"warning: {path} is empty, though rows are written beside it: all is asked again, and the new rows take "
            "their place. If that is not meant, stop the run and put the journal back.",
            file=sys.stderr,
            flush=True,
        )


def explained(path: Path, error: sqlite3.Error, what: str) -> UserError:
    """Return what the user can do about an error of SQLite."""
    code = getattr(error, "sqlite_errorcode", None)  # none where a text is not UTF-8, which would be quoted
    said = f"{path}: {what} ({'a text in it is not UTF-8' if code is None else error})"
    match sqlite3.SQLITE_CORRUPT if code is None else code & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_MISMATCH | sqlite3.SQLITE_ERROR:
            return UserError(
                f"{said}. The file is damaged, or is no journal. What is written beside it stays as it is. Move "
                f"the file away, with {path.name}-wal if there is one, and start the same command again: it "
                "asks anew, and puts the new rows in the place of those there, so copy these if you want to keep "
                "them."
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return UserError(
                f"{said}. Another program has locked the file. Close it, and start the same command again: "
                "what was written before is safe."
            )
        case _:
            return UserError(
                f"{said}. What was written before is safe: make room, see to the disk and to the permissions of "
                "the file and its folder, and start the same command again."
            )
