"""Metrics of IFEval: shares of prompts and constraints with intervals, by rule, and the gap to the user turn.

One answer answers all constraints of its prompt, so prompts are the independent units (train/resampling.py). The gap is
computed over the same prompts, from the difference of each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.ifeval.checkers import ConstraintVerdict
from train.ifeval.rows import IFEvalRow
from train.resampling import (
    DIFFERENCE_BOUNDS,
    SHARE_BOUNDS,
    Bounds,
    Estimate,
    IntervalMethod,
    estimate_means,
    missing_interval_reason,
)

MEASURES = {
    "prompt_strict": "prompts whose constraints are all followed, strict",
    "prompt_loose": "prompts whose constraints are all followed, loose",
    "constraint_strict": "constraints followed, strict",
    "constraint_loose": "constraints followed, loose",
}


@dataclass(frozen=True)
class Share:
    """The share that is followed, out of `of`, with a 95 % interval over `prompts`; otherwise as an Estimate."""

    value: float
    low: float | None
    high: float | None
    of: int
    prompts: int
    interval: IntervalMethod

    @property
    def missing(self) -> str:
        """Return the reason for a missing interval, as `missing_interval_reason` gives it."""
        return missing_interval_reason(self.interval, self.prompts)

    def record(self) -> dict[str, Any]:
        """Return the share for JSON."""
        return asdict(self)


def shares(rows: Sequence[IFEvalRow], verdicts: Sequence[ConstraintVerdict], seed: int = 0) -> dict[str, Share]:
    """Return the four measures by name."""
    return {name: _share(values, groups, seed) for name, (values, groups) in _scores(rows, verdicts).items()}


def shares_by_rule(
    rows: Sequence[IFEvalRow], verdicts: Sequence[ConstraintVerdict], seed: int = 0
) -> dict[str, dict[str, Share]]:
    """Return rule -> strict and loose share of its constraints."""
    return {
        rule: {
            manner: _share(*_of_rule(rows, rule, lambda row: getattr(verdicts[row], manner)), seed)  # noqa: B023
            for manner in ("strict", "loose")
        }
        for rule in rules_of(rows)
    }


def gaps(
    rows: Sequence[IFEvalRow],
    system: Sequence[ConstraintVerdict],
    user: Sequence[ConstraintVerdict],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return system turn minus user turn in each measure, over the same prompts, with interval and sign-flip p."""
    ours, theirs = _scores(rows, system), _scores(rows, user)
    return {name: _difference(ours[name], theirs[name], seed) for name in MEASURES}


def gaps_by_rule(
    rows: Sequence[IFEvalRow],
    system: Sequence[ConstraintVerdict],
    user: Sequence[ConstraintVerdict],
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return rule -> system turn minus user turn in the strict share of its constraints."""
    return {
        rule: _difference(
            _of_rule(rows, rule, lambda row: system[row].strict),
            _of_rule(rows, rule, lambda row: user[row].strict),
            seed,
        )
        for rule in rules_of(rows)
    }


def rules_of(rows: Sequence[IFEvalRow]) -> list[str]:
    """Return the names of the rules that occur, sorted."""
    return sorted({rule for row in rows for rule in row.instructions})


_Scores = tuple[list[float], list[int]]
"""Values, each with the number of its prompt."""


def _scores(rows: Sequence[IFEvalRow], verdicts: Sequence[ConstraintVerdict]) -> dict[str, _Scores]:
    prompts = list(range(len(rows)))
    constraints = [prompt for prompt in prompts for _ in rows[prompt].instructions]
    return {
        "prompt_strict": ([float(all(verdict.strict)) for verdict in verdicts], prompts),
        "prompt_loose": ([float(all(verdict.loose)) for verdict in verdicts], prompts),
        "constraint_strict": ([float(follows) for verdict in verdicts for follows in verdict.strict], constraints),
        "constraint_loose": ([float(follows) for verdict in verdicts for follows in verdict.loose], constraints),
    }


def _of_rule(rows: Sequence[IFEvalRow], rule: str, follows: Callable[[int], Sequence[bool]]) -> _Scores:
    scores = [
        (float(followed), number)
        for number, row in enumerate(rows)
        for name, followed in zip(row.instructions, follows(number), strict=True)
        if name == rule
    ]
    return [value for value, _ in scores], [number for _, number in scores]


def _share(values: list[float], prompts: list[int], seed: int) -> Share:
    estimate = _estimate(values, prompts, SHARE_BOUNDS, seed, permutations=1)  # a share is not tested against zero
    return Share(estimate.mean, estimate.low, estimate.high, len(values), estimate.groups, estimate.interval)


def _difference(first: _Scores, second: _Scores, seed: int) -> Estimate:
    differences = [a - b for a, b in zip(first[0], second[0], strict=True)]
    return _estimate(differences, first[1], DIFFERENCE_BOUNDS, seed)


def _estimate(values: list[float], prompts: list[int], bounds: Bounds, seed: int, **options: int) -> Estimate:
    column = np.array(values, np.float64)[:, None]
    return estimate_means(column, np.array(prompts, np.int64), np.zeros(1), [bounds], seed=seed, **options)[0]
