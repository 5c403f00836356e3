"""The file of `--check --json FILE`: only ever an earlier report is replaced, and never by half of a new one."""

import json
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.storage.atomic_write import atomic_write, write_text

KEYS = frozenset({"ready", "error", "model", "training", "schedule", "examples"})
"""Every report has these; a file without them is something else."""


def discard_earlier(name: str) -> Path:
    """The path of FILE, after an earlier report there is deleted: it must not pass for the one to come.

    Raises UserError where something else is there, which stays as it is.
    """
    path = Path(name).resolve()
    if not name or path.is_dir():
        raise UserError(f"--json {name!r}: that is no file. Name one to write the report to.")
    if not path.exists():
        return path
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        found = None
    if not (isinstance(found, dict) and found.keys() >= KEYS):
        raise UserError(f"--json {name}: that is no report of --check, so it is not replaced. Name another file.")
    try:
        path.unlink()
    except OSError as fault:
        raise _refuse(path, fault) from fault
    return path


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report, under a name for the meantime until it is whole. Raises UserError where that can't be done."""
    try:
        with atomic_write(path) as [unfinished]:
            write_text(unfinished, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as fault:
        raise _refuse(path, fault) from fault


def _refuse(path: Path, fault: OSError) -> UserError:
    return UserError(f"--json {path}: {fault.strerror}. Name a file in a folder that can be written.")
