"""Measures of results, and what their readers share: rows, intervals, and a check that rows and figures agree."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.resampling import estimate_share, missing_interval_reason

Record = dict[str, Any]
Numbers = dict[str, tuple[float, ...]]
"""Row -> its numbers."""


@dataclass(frozen=True)
class Measure:
    """One figure.

    - `unit`: "share" (0 to 1), "points" (the difference of two shares), "nats" or "score".
    - `rows`: row -> its numbers, whose mean over all rows is `value`; None if they were not kept.
    - `groups`: row -> its group of the bootstrap; a row that is not listed is a group of its own.
    - `detail`: one of many, which a short table leaves out.
    - `missing`: the reason for a missing interval, if known (`train.resampling.missing_interval_reason`).
    - `lower_is_better`: shown beside the measure's name.
    - `parts`: row -> the line of the bench whose rubrics its score is the mean of.
    """

    value: float
    low: float | None
    high: float | None
    unit: str = "share"
    rows: Mapping[str, tuple[float, ...]] | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    detail: bool = False
    missing: str = ""
    lower_is_better: bool = False
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Results of one kind.

    - `model`: the model's name in the command; `folder`: its absolute path at that time, if known.
    - `incomplete`: missing parts of the figures, as a predicate: `is not finished: ...`.
    """

    kind: str
    path: Path
    model: str
    measures: Mapping[str, Measure]
    conditions: Mapping[str, Any]
    notes: Mapping[str, Any]
    folder: str | None = None
    incomplete: str = ""


def folder_of(model: str | Path) -> str | None:
    """Return the absolute path of a model's folder; None for a hub id."""
    return str(Path(model).resolve()) if Path(model).is_dir() else None


def iter_rows(path: Path) -> Iterator[Record]:
    """Yield the lines of a file of rows; none if there is no such file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield json.loads(line)


def read_interval(estimate: Mapping[str, Any], groups: str) -> dict[str, Any]:
    """Return low, high and `missing` of a Measure. `groups`: the key of the number of independent groups.

    Before intervals of equal values were Wilson's, they had no width: such an interval counts as missing.
    """
    low, high = estimate["low"], estimate["high"]
    if low is None or low == high:
        reason = missing_interval_reason(estimate.get("interval", ""), estimate.get(groups, 0))
        return {"low": None, "high": None, "missing": reason}
    return {"low": low, "high": high}


def check_rows(measure: Measure, path: Path) -> Measure:
    """Return `measure`. Raises UserError if its rows do not have its mean, as another run has overwritten them."""
    numbers = [number for of_row in (measure.rows or {}).values() for number in of_row]
    if numbers and abs(sum(numbers) / len(numbers) - measure.value) > 1e-6:
        raise UserError(f"{path}: the rows beside it belong to another run. Measure this model again.")
    return measure


def share_measure(value: float, rows: Mapping[str, tuple[float, ...]], groups: Mapping[str, str]) -> Measure:
    """Return a share with the interval over its rows, or without an interval if there are no rows."""
    if not rows:
        return Measure(value, None, None)
    estimate = estimate_share([number for (number,) in rows.values()], [groups[key] for key in rows])
    return Measure(value, estimate.low, estimate.high, rows=rows, groups=groups, missing=estimate.missing)
