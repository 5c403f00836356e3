"""The file of `--check --json FILE`: written atomically, and only an earlier report is replaced."""

import json
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.storage.atomic_write import atomic_write, write_text

_KEYS = frozenset({"ready", "error", "model", "training", "schedule", "examples"})
"""Keys of every report; a JSON file without them is something else."""


def discard_earlier_report(name: str) -> Path:
    """Delete an earlier report at `name`, which must not pass for the one to come; return its path.

    Raises UserError if something else is there, which stays as it is.
    """
    path = Path(name).resolve()
    if not name or path.is_dir():
        raise UserError(f"--json {name!r}: that is no file. Name one to write the report to.")
    if not path.exists():
        return path
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        content = None
    if not (isinstance(content, dict) and content.keys() >= _KEYS):
        raise UserError(f"--json {name}: that is no report of --check, so it is not replaced. Name another file.")
    try:
        path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report atomically. Raises UserError if the file can't be written."""
    try:
        with atomic_write(path) as [unfinished]:
            write_text(unfinished, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--json {path}: {error.strerror}. Name a file in a folder that can be written.")
