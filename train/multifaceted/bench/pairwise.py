"""Two models on the rows of the bench that both have a score for: win, both good, both bad.

A row goes to the model whose score there is the higher one: the mean of the rubrics that both have a score for. Where
both have the same, up to rounding, they are both good if that score is at least `good` (4 of 5), else both bad. Shares
have Wilson's intervals; p is that of a two-sided sign-flip test of the mean difference in scores (train/resampling.py).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from train.data.sources.formats import RowError
from train.data.sources.source import read_rows
from train.errors import UserError
from train.formatting import format_count
from train.multifaceted.bench.protocol import GOOD, noted_of, protocol_of, refuse_other_protocol
from train.recipe import Source
from train.reporting.conditions import all_differences, missing_conditions
from train.resampling import SHARE_BOUNDS, Bounds, Estimate, estimate_means, explain_missing_intervals

OUTCOMES = ("win of the first", "win of the second", "both good", "both bad")
_DIFFERENCE = (-4.0, 4.0)  # scores are 1 to 5


@dataclass(frozen=True, slots=True)
class PairwiseComparison:
    """`shares`: of each of OUTCOMES; `counts` likewise. `difference`: of the scores, first less second.

    `only_first`, `only_second`: rows of one file alone. `without_score`: rows of both of which one has no score.
    `notes`: settings that a file doesn't record, those of the models that differ, and what is not finished.
    """

    names: tuple[str, str]
    rows: int
    good: float
    counts: dict[str, int]
    shares: dict[str, Estimate]
    difference: Estimate
    only_first: int
    only_second: int
    without_score: int
    notes: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "rows": self.rows,
            "good_from": self.good,
            "outcomes": {
                name: {
                    "rows": self.counts[name],
                    "share": one.mean,
                    "low": one.low,
                    "high": one.high,
                    "interval": one.interval,
                }
                for name, one in self.shares.items()
            },
            "difference": self.difference.record(),
            "rows_of_the_first_alone": self.only_first,
            "rows_of_the_second_alone": self.only_second,
            "rows_without_a_score": self.without_score,
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """A table and a line on the difference."""
        first, second = self.names
        shown = (
            f"{first} wins",
            f"{second} wins",
            f"both good (a tie at {self.good:g} or more)",
            "both bad (a tie below)",
        )
        lines = ["| | rows | share (95 %) |", "|---|---:|---|"]
        for text, (name, one) in zip(shown, self.shares.items(), strict=True):
            interval = f" ({one.missing})" if one.missing else f" [{one.low:.1%}, {one.high:.1%}]"
            lines.append(f"| {text} | {self.counts[name]:,} | {one.mean:.1%}{interval} |")
        found = self.difference
        interval = f" ({found.missing})" if found.missing else f" [{found.low:+.2f}, {found.high:+.2f}]"
        lines += [
            "",
            f"Rows that both have a score for: {self.rows:,}. {first} less {second} is {found.mean:+.2f}{interval}; "
            f"p = {found.p:.2g} (sign flips).",
        ]
        left = [
            f"{format_count(count, 'row')} {what}"
            for count, what in (
                (self.only_first, f"of {first} alone"),
                (self.only_second, f"of {second} alone"),
                (self.without_score, "without a score in one of them"),
            )
            if count
        ]
        if left:
            lines.append(f"Left out: {', '.join(left)}.")
        lines += [f"Note: {note}." for note in self.notes]
        lines += explain_missing_intervals("\n".join(lines))
        return "\n".join(lines) + "\n"


def compare_pairwise(
    first: Path, second: Path, *, names: tuple[str, str] | None = None, good: float = GOOD, seed: int = 0
) -> PairwiseComparison:
    """Compare two files bench_rows.jsonl. `names`: of the models, in the tables (default: the files' folders).

    Raises UserError for files that aren't such, that share no row with a score, or whose judges, settings or rows
    differ.
    """
    rows_of_first, rows_of_second = read_results(first), read_results(second)
    records = read_protocol(first, rows_of_first), read_protocol(second, rows_of_second)
    settings, noted = [protocol_of(record) for record in records], [noted_of(record) for record in records]
    for one in settings:
        del one["judge model"]  # every row names its judge, in files of earlier versions as well
    sides = names or _names(first, second)
    incomplete = [
        f"{side} {what}"
        for side, rows in zip(sides, (rows_of_first, rows_of_second), strict=True)
        if (what := unfinished_in(rows.values()))
    ]
    shared = [id for id in rows_of_first if id in rows_of_second]
    differences = []
    outcomes = []
    without_score = 0
    for id in shared:
        one, other = rows_of_first[id], rows_of_second[id]
        if what := _differs(one, other):
            raise UserError(f"{second}: row {id!r} has {what} than in {first}: these are two data sets.")
        if one["judge"] != other["judge"]:
            raise UserError(
                f"{second}: its judge is {other['judge']}, that of {first} is {one['judge']}. Scores of two judges "
                "can't be compared: evaluate both models with the same one."
            )
        if one["score"] is None or other["score"] is None:
            without_score += 1
            continue
        if not (scores := scores_of_shared_rubrics(one, other)):
            without_score += 1
            continue
        outcomes.append(outcome(*scores, good))
        differences.append(scores[0] - scores[1])
    refuse_other_protocol(str(first), settings[0], str(second), settings[1])
    if not outcomes:
        why = f" {'. '.join(incomplete)}." if incomplete else ""
        raise UserError(f"{first} and {second}: there is no row that has a score in both.{why}")
    table = np.array([[name == found for name in OUTCOMES] for found in outcomes], np.float64)
    values = np.column_stack([table, differences])
    bounds: list[Bounds] = [*[SHARE_BOUNDS] * len(OUTCOMES), _DIFFERENCE]
    found = estimate_means(values, np.arange(len(values)), np.zeros(values.shape[1]), bounds, seed=seed)
    return PairwiseComparison(
        sides,
        len(outcomes),
        good,
        {name: outcomes.count(name) for name in OUTCOMES},
        dict(zip(OUTCOMES, found, strict=False)),
        found[-1],
        len(rows_of_first) - len(shared),
        len(rows_of_second) - len(shared),
        without_score,
        [
            *missing_conditions(settings[0], settings[1], sides),
            *all_differences(noted[0], noted[1], sides),
            *incomplete,
        ],
    )


def outcome(first: float, second: float, good: float = GOOD) -> str:
    """Which of OUTCOMES two scores of a row are."""
    if math.isclose(first, second, abs_tol=1e-9):
        return OUTCOMES[2] if first >= good - 1e-9 else OUTCOMES[3]
    return OUTCOMES[0] if first > second else OUTCOMES[1]


def rubric_scores(row: Mapping[str, Any]) -> list[float | None]:
    """Return the score of each rubric of a line; an empty list where an earlier version has not recorded them."""
    rubrics = row.get("rubrics") or []
    return [rubric["score"] for rubric in rubrics] if all("score" in rubric for rubric in rubrics) else []


def scores_of_shared_rubrics(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the scores of two lines of the same row over the rubrics that both have; None where they share none."""
    ours, theirs = rubric_scores(one), rubric_scores(other)
    if not ours or len(ours) != len(theirs) or (None not in ours and None not in theirs):
        return one["score"], other["score"]
    shared = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return (fmean(a for a, _ in shared), fmean(b for _, b in shared)) if shared else None


def unfinished_in(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return what the scores of a file lack: `is not finished: ...`, `has ...`; nothing where they are whole."""
    pending = 0
    partly: Counter[tuple[int, int]] = Counter()
    for row in rows:
        scores = rubric_scores(row)
        if row["score"] is not None and None in scores:
            partly[sum(score is not None for score in scores), len(scores)] += 1
        for answer in row.get("answers") or ():
            judgements = (one for runs in answer.get("judgements") or () for one in runs if one)
            pending += sum(one.get("missing") == "pending" for one in judgements)
    found = [
        f"{format_count(count, 'row')} scored by {some:,} of {'its' if count == 1 else 'their'} {every:,} rubrics"
        for (some, every), count in sorted(partly.items())
    ]
    if pending:
        return "; ".join([f"is not finished: {format_count(pending, 'judgement')} pending", *found])
    return f"has {'; '.join(found)} (compared by the rubrics that both have)" if found else ""


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names; those of the files where that doesn't tell them apart."""
    folders = first.absolute().parent.name, second.absolute().parent.name
    return folders if folders[0] != folders[1] else (str(first), str(second))


def _differs(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two rows of one id aren't the same row; nothing where they are."""
    if one["prompt"] != other["prompt"]:
        return "another prompt"
    if one.get("system") != other.get("system"):
        return "another system message"
    criteria, others = ([rubric.get("criteria") for rubric in row.get("rubrics") or ()] for row in (one, other))
    return "other rubrics" if criteria != others else ""


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a bench_rows.jsonl by the ids of their rows. Raises UserError."""
    rows: dict[str, dict[str, Any]] = {}
    for place, row in read_rows(Source(path=str(path))):
        if isinstance(row, RowError):
            raise UserError(f"{place}: {row}.")
        wanted: Sequence[str] = ("id", "prompt", "judge", "score")
        if any(name not in row for name in wanted) or not isinstance(row["score"], int | float | None):
            raise UserError(f"{place}: that is no line of bench_rows.jsonl: it has {', '.join(wanted)}.")
        rows[str(row["id"])] = row
    return rows


def read_protocol(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of the settings that rows were scored with: their own, or else the bench.json beside them."""
    line = next(iter(rows.values()), {})
    if "protocol" in line:
        return {"protocol": line["protocol"]}
    try:
        record = json.loads(path.with_name("bench.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    return record if isinstance(record, dict) and isinstance(record.get("judge"), dict) else {"protocol": {}}
