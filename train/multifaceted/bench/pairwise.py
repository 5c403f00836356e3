"""Pairwise comparison of two models on the rows of the bench that both have a score for: wins, both good, both bad.

- The model with the higher score wins a row. A score is the mean over the rubrics that both have a score for.
- Equal scores, up to rounding, are both good from `good` (4 of 5) on, else both bad.
- Shares have Wilson intervals; p is that of a two-sided sign-flip test of the mean difference (train/resampling.py).
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
    """Wins, ties and the mean difference of two models.

    - `counts`, `shares`: of each of OUTCOMES. `difference`: first minus second score.
    - `only_first`, `only_second`: number of rows in one file only. `without_score`: rows of both files of which one
      has no score.
    - `notes`: settings that a file does not record or that differ between the models, and unfinished results.
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
        """Return the comparison for JSON."""
        return {
            "first": self.names[0],
            "second": self.names[1],
            "rows": self.rows,
            "good_from": self.good,
            "outcomes": {
                name: {
                    "rows": self.counts[name],
                    "share": share.mean,
                    "low": share.low,
                    "high": share.high,
                    "interval": share.interval,
                }
                for name, share in self.shares.items()
            },
            "difference": self.difference.record(),
            "rows_of_the_first_alone": self.only_first,
            "rows_of_the_second_alone": self.only_second,
            "rows_without_a_score": self.without_score,
            "notes": list(self.notes),
        }

    def markdown(self) -> str:
        """Return a table of the shares and a line on the difference."""
        first, second = self.names
        shown = (
            f"{first} wins",
            f"{second} wins",
            f"both good (a tie at {self.good:g} or more)",
            "both bad (a tie below)",
        )
        lines = ["| | rows | share (95 %) |", "|---|---:|---|"]
        for text, (name, share) in zip(shown, self.shares.items(), strict=True):
            interval = f" ({share.missing})" if share.missing else f" [{share.low:.1%}, {share.high:.1%}]"
            lines.append(f"| {text} | {self.counts[name]:,} | {share.mean:.1%}{interval} |")
        change = self.difference
        interval = f" ({change.missing})" if change.missing else f" [{change.low:+.2f}, {change.high:+.2f}]"
        lines += [
            "",
            f"Rows with a score in both: {self.rows:,}. {first} minus {second}: {change.mean:+.2f}{interval}, "
            f"p = {change.p:.2g} (sign-flip test).",
        ]
        skipped = [
            f"{format_count(count, 'row')} {reason}"
            for count, reason in (
                (self.only_first, f"only in {first}"),
                (self.only_second, f"only in {second}"),
                (self.without_score, "without a score in one of them"),
            )
            if count
        ]
        if skipped:
            lines.append(f"Skipped: {', '.join(skipped)}.")
        lines += [f"Note: {note}." for note in self.notes]
        lines += explain_missing_intervals("\n".join(lines))
        return "\n".join(lines) + "\n"


def compare_pairwise(
    first: Path, second: Path, *, names: tuple[str, str] | None = None, good: float = GOOD, seed: int = 0
) -> PairwiseComparison:
    """Compare two files bench_rows.jsonl. `names`: of the models, for the tables (default: the files' folders).

    Raises UserError for files that are no bench_rows.jsonl, that share no row with a score, or whose judges, settings
    or rows differ.
    """
    rows_of_first, rows_of_second = read_results(first), read_results(second)
    records = read_protocol(first, rows_of_first), read_protocol(second, rows_of_second)
    settings, noted = [protocol_of(record) for record in records], [noted_of(record) for record in records]
    for of_file in settings:
        del of_file["judge model"]  # every row names its judge, in files of earlier versions as well
    sides = names or _names(first, second)
    incomplete = [
        f"{side} {problem}"
        for side, rows in zip(sides, (rows_of_first, rows_of_second), strict=True)
        if (problem := unfinished_in(rows.values()))
    ]
    shared = [id for id in rows_of_first if id in rows_of_second]
    differences = []
    outcomes = []
    without_score = 0
    for id in shared:
        row_of_first, row_of_second = rows_of_first[id], rows_of_second[id]
        if part := _differing_part(row_of_first, row_of_second):
            raise UserError(f"{second}: row {id!r} has {part} than in {first}: these are two data sets.")
        if row_of_first["judge"] != row_of_second["judge"]:
            raise UserError(
                f"{second}: its judge is {row_of_second['judge']}, that of {first} is {row_of_first['judge']}. Scores "
                "of two judges cannot be compared: evaluate both models with the same judge."
            )
        if row_of_first["score"] is None or row_of_second["score"] is None:
            without_score += 1
            continue
        if not (scores := scores_of_shared_rubrics(row_of_first, row_of_second)):
            without_score += 1
            continue
        outcomes.append(pairwise_outcome(*scores, good))
        differences.append(scores[0] - scores[1])
    refuse_other_protocol(str(first), settings[0], str(second), settings[1])
    if not outcomes:
        reason = f" {'. '.join(incomplete)}." if incomplete else ""
        raise UserError(f"{first} and {second}: no row has a score in both.{reason}")
    table = np.array([[name == outcome for name in OUTCOMES] for outcome in outcomes], np.float64)
    values = np.column_stack([table, differences])
    bounds: list[Bounds] = [*[SHARE_BOUNDS] * len(OUTCOMES), _DIFFERENCE]
    columns = estimate_means(values, np.arange(len(values)), np.zeros(values.shape[1]), bounds, seed=seed)
    return PairwiseComparison(
        sides,
        len(outcomes),
        good,
        {name: outcomes.count(name) for name in OUTCOMES},
        dict(zip(OUTCOMES, columns, strict=False)),
        columns[-1],
        len(rows_of_first) - len(shared),
        len(rows_of_second) - len(shared),
        without_score,
        [
            *missing_conditions(settings[0], settings[1], sides),
            *all_differences(noted[0], noted[1], sides),
            *incomplete,
        ],
    )


def pairwise_outcome(first: float, second: float, good: float = GOOD) -> str:
    """Return the member of OUTCOMES for two scores of a row."""
    if math.isclose(first, second, abs_tol=1e-9):
        return OUTCOMES[2] if first >= good - 1e-9 else OUTCOMES[3]
    return OUTCOMES[0] if first > second else OUTCOMES[1]


def rubric_scores(row: Mapping[str, Any]) -> list[float | None]:
    """Return the score of each rubric of a line; an empty list for a line of an earlier version without them."""
    rubrics = row.get("rubrics") or []
    return [rubric["score"] for rubric in rubrics] if all("score" in rubric for rubric in rubrics) else []


def scores_of_shared_rubrics(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the scores of two lines of the same row over the rubrics scored in both; None if there are none."""
    ours, theirs = rubric_scores(first), rubric_scores(second)
    if not ours or len(ours) != len(theirs) or (None not in ours and None not in theirs):
        return first["score"], second["score"]
    shared = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return (fmean(a for a, _ in shared), fmean(b for _, b in shared)) if shared else None


def unfinished_in(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the gaps in the scores of a file: `is not finished: ...` or `has ...`; empty if complete."""
    pending = 0
    partly: Counter[tuple[int, int]] = Counter()
    for row in rows:
        scores = rubric_scores(row)
        if row["score"] is not None and None in scores:
            partly[sum(score is not None for score in scores), len(scores)] += 1
        for answer in row.get("answers") or ():
            judgements = (judgement for runs in answer.get("judgements") or () for judgement in runs if judgement)
            pending += sum(judgement.get("missing") == "pending" for judgement in judgements)
    partly_scored = [
        f"{format_count(count, 'row')} scored by {scored:,} of {'its' if count == 1 else 'their'} {total:,} rubrics"
        for (scored, total), count in sorted(partly.items())
    ]
    if pending:
        return "; ".join([f"is not finished: {format_count(pending, 'judgement')} pending", *partly_scored])
    return f"has {'; '.join(partly_scored)} (compared by the rubrics scored in both)" if partly_scored else ""


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Return the names of the folders, or of the files if the folders have the same name."""
    folders = first.absolute().parent.name, second.absolute().parent.name
    return folders if folders[0] != folders[1] else (str(first), str(second))


def _differing_part(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return the first part in which two rows of the same id differ; empty if they are the same row."""
    if first["prompt"] != second["prompt"]:
        return "another prompt"
    if first.get("system") != second.get("system"):
        return "another system message"
    ours, theirs = ([rubric.get("criteria") for rubric in row.get("rubrics") or ()] for row in (first, second))
    return "other rubrics" if ours != theirs else ""


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a bench_rows.jsonl by the ids of their rows. Raises UserError."""
    rows: dict[str, dict[str, Any]] = {}
    for place, row in read_rows(Source(path=str(path))):
        if isinstance(row, RowError):
            raise UserError(f"{place}: {row}.")
        required = ("id", "prompt", "judge", "score")
        if any(name not in row for name in required) or not isinstance(row["score"], int | float | None):
            raise UserError(f"{place}: that is no line of bench_rows.jsonl, which has {', '.join(required)}.")
        rows[str(row["id"])] = row
    return rows


def read_protocol(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of the settings of scored rows: their own, or else that of the bench.json beside them."""
    line = next(iter(rows.values()), {})
    if "protocol" in line:
        return {"protocol": line["protocol"]}
    try:
        record = json.loads(path.with_name("bench.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    return record if isinstance(record, dict) and isinstance(record.get("judge"), dict) else {"protocol": {}}
