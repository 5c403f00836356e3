"""Folder of results: its location, a lock for each command, and files that are replaced together."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.evaluation.measured_models import HEADING, several_models_section
from train.evaluation.required_paths import require_results_folder
from train.reporting.markdown import replace_section
from train.storage.atomic_write import atomic_write, write_text
from train.storage.file_lock import LockHeldError, acquire_lock

Writer = Callable[[Path], None]
"""Writes one file to the given path."""


def output_folder(model: str, output_dir: str | Path | None, *, remedy: str) -> Path:
    """Return `output_dir`, created if it is missing, or else the folder of the model.

    `remedy`: the sentence of the error for a model that is no folder. Raises UserError, also if the folder is not
    writable.
    """
    folder = Path(output_dir or model)
    if not output_dir:
        require_results_folder("--model", model, remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder}: is not writable.")
    return folder


@contextmanager
def exclusive(folder: Path, command: str) -> Iterator[None]:
    """Lock `folder`, which must exist, against a second run of `command`: both would write the same files.

    Other commands write other files and are not locked out. Raises UserError if another run holds the lock, or if the
    folder is not writable.
    """
    try:
        lock = acquire_lock(folder / f".{command}.lock")
    except LockHeldError as holder:
        raise UserError(
            f"{folder}: another run of `{command}` is writing there ({holder}). Wait until it ends, stop it, or write "
            "the results of this one to another folder."
        ) from holder
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock:
        yield


def write_results(folder: Path, files: Mapping[str, Writer], *, heading: str = "", section: str = "") -> None:
    """Write `files` (name -> writer), all replaced together, and put `section` into report.md.

    The report also says if the results in the folder are of several models.
    `heading`: the line that `section` begins with; empty = no report. Raises UserError if the folder is not writable.
    """
    try:
        with atomic_write(*(folder / name for name in files)) as staged:
            for path, write in zip(staged, files.values(), strict=True):
                write(path)
        if heading:
            replace_section(folder / "report.md", heading, section)
            replace_section(folder / "report.md", HEADING, several_models_section(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def as_json(record: Mapping[str, Any]) -> Writer:
    """Return a writer of one indented JSON object."""
    return lambda path: write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def as_jsonl(records: Iterable[Mapping[str, Any]]) -> Writer:
    """Return a writer of one JSON object per line."""
    return lambda path: write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def fingerprint_of(contents: Any) -> str:
    """Return a checksum of JSON contents, by which `compare` checks that two runs asked the same."""
    return hashlib.blake2b(json.dumps(contents, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
