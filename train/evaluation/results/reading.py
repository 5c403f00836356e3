"""Results of a folder or of one file, and those of the model before training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import overload

from train.errors import UserError
from train.evaluation.results.kinds import KINDS
from train.evaluation.results.measures import Results
from train.storage.local_paths import describe_missing_path


def read_results(place: Path) -> dict[str, Results]:
    """Return kind -> results of a folder, or of one file. Raises UserError if there are none."""
    if place.is_dir():
        paths = [place / kind.file for kind in KINDS.values() if (place / kind.file).is_file()]
        if not paths:
            names = ", ".join(kind.file for kind in KINDS.values())
            raise UserError(f"{place}: has no results (any of {names}). Measure the model first.")
    elif place.is_file():
        paths = [place]
    else:
        raise UserError(f"{place}: there is no such folder or file: {describe_missing_path(place)}")
    return {results.kind: results for results in map(_read, paths)}


def read_before(later: Mapping[str, Results], place: Path) -> tuple[dict[str, Results], dict[str, str]]:
    """Return the results in `place`, with those that `later` holds of the same model (measured with `--before`).

    Also return kind -> folder of the kinds whose model before training is another one. Raises UserError if there are no
    results of the model in `place`.
    """
    before = {kind: earlier for kind, results in later.items() if (earlier := _read(results.path, before=True))}
    of_place = {kind: results for kind, results in before.items() if _place_of(results) == place.resolve()}
    others = {kind: str(_place_of(results)) for kind, results in before.items() if kind not in of_place}
    if of_place and not any((place / kind.file).is_file() for kind in KINDS.values()):
        return of_place, others
    try:
        return of_place | read_results(place), others
    except UserError as error:
        if not others:
            raise
        raise UserError(
            f"{str(error).rstrip('.')}. B was measured with --before {next(iter(others.values()))}, and A is "
            f"{place.resolve()}"
        ) from error


def _place_of(results: Results) -> Path:
    """Return the folder that a model had when it was measured or, if that is gone, its name relative to this folder."""
    if results.folder and Path(results.folder).is_dir():
        return Path(results.folder).resolve()
    return Path(results.model).resolve()


@overload
def _read(path: Path) -> Results: ...
@overload
def _read(path: Path, *, before: bool) -> Results | None: ...
def _read(path: Path, *, before: bool = False) -> Results | None:
    """Return the results in a file; with `before` those of the model before training, or None without one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in KINDS.items():
            if isinstance(record, dict) and kind.matches(record):
                if not before:
                    return kind.read(name, path, record)
                return kind.read_before(name, path, record) if kind.read_before else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: the file, or the rows beside it, cannot be read as results: {reason}") from error
    raise UserError(f"{path}: not a result of evaluate.py ({', '.join(KINDS)})")
