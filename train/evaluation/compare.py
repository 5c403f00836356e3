"""Two sets of results side by side: the difference of each measure, paired by rows where both kept theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.errors import UserError
from train.evaluation.results import Measure, Results
from train.multifaceted.bench.pairwise import scores_of_shared_rubrics
from train.progress import progress_bar
from train.reporting.conditions import all_differences, missing_conditions, recorded_differences
from train.resampling import DIFFERENCE_BOUNDS, Bounds, Estimate, estimate_means

_BOUNDS: dict[str, Bounds] = {"share": DIFFERENCE_BOUNDS, "points": (-2.0, 2.0)}
"""Of the difference of two measures, by their unit; none of the others."""


@dataclass(frozen=True)
class MeasurePair:
    """One measure of both. `difference` = the second less the first, with interval and p where rows are paired.

    `rows`: over how many rows; None where a side kept none, and then the plain difference is all there is.
    """

    kind: str
    name: str
    first: Measure
    second: Measure
    difference: Estimate | None
    rows: int | None

    @property
    def change(self) -> float:
        """The second less the first."""
        return self.second.value - self.first.value

    def record(self) -> dict[str, Any]:
        """For JSON."""
        sides = {
            side: {"value": measure.value, "low": measure.low, "high": measure.high}
            for side, measure in (("a", self.first), ("b", self.second))
        }
        paired = asdict(self.difference) if self.difference else None
        return {"kind": self.kind, "measure": self.name, "unit": self.first.unit, **sides, "change": self.change,
                "paired": paired, "rows": self.rows}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """`notes`: in what the two were measured otherwise that need not keep them apart, and what one side alone has."""

    pairs: Sequence[MeasurePair]
    notes: Sequence[str]


def compare_results(
    first: Mapping[str, Results],
    second: Mapping[str, Results],
    *,
    seed: int = 0,
    only_second: Mapping[str, str] | None = None,
) -> Comparison:
    """Every measure that both have. Raises UserError where they were measured on other data or otherwise.

    `only_second`: why the first lacks a kind that the second has, where that is known.
    """
    why = {kind: f": {reason}" for kind, reason in (only_second or {}).items() if kind in second and kind not in first}
    shared = [kind for kind in first if kind in second]
    if not shared:
        raise UserError(
            f"there is nothing that both were measured by: A has {', '.join(first)}, B has {', '.join(second)}"
            + "".join(f". {kind}{reason}" for kind, reason in list(why.items())[:1])
        )
    faults = [
        f"{kind}: {fault}"
        for kind in shared
        for fault in recorded_differences(first[kind].conditions, second[kind].conditions)
    ]
    if faults:
        raise UserError(
            f"they were not measured alike: {'; '.join(faults)}. Measure both with the same data and options, or name "
            "with --only what to compare."
        )
    notes = [f"{kind}: only A has it" for kind in first if kind not in second]
    notes += [f"{kind}: only B has it{why.get(kind, '')}" for kind in second if kind not in first]
    pairs = []
    for kind in shared:
        one, other = first[kind], second[kind]
        notes += [f"{kind}: {sentence}" for sentence in missing_conditions(one.conditions, other.conditions)]
        notes += [f"{kind}: {change}" for change in all_differences(one.notes, other.notes)]
        notes += [
            f"{kind}: {side} {results.incomplete}" for side, results in (("A", one), ("B", other)) if results.incomplete
        ]
        notes += [
            f"{kind}: {name}: only {side} has it"
            for side, has, lacks in (("A", one, other), ("B", other, one))
            for name, measure in has.measures.items()
            if name not in lacks.measures and not measure.detail
        ]
        both = [name for name in one.measures if name in other.measures]
        with progress_bar(f"comparing {kind}", total=len(both), unit="measures") as comparing:
            for name in both:
                pairs.append(_pair(kind, name, one.measures[name], other.measures[name], seed))
                comparing.advance()
    return Comparison(pairs, notes)


def _pair(kind: str, name: str, first: Measure, second: Measure, seed: int) -> MeasurePair:
    if first.rows is None or second.rows is None:
        return MeasurePair(kind, name, first, second, None, None)
    shared = [row for row in first.rows if row in second.rows]
    differences: list[float] = []
    groups: list[str] = []
    rows = 0
    for row in shared:
        ours, theirs = first.rows[row], second.rows[row]
        if row in first.parts and row in second.parts:
            if not (scores := scores_of_shared_rubrics(first.parts[row], second.parts[row])):
                continue
            ours, theirs = (scores[0],), (scores[1],)
        rows += 1
        differences += [b - a for a, b in zip(ours, theirs, strict=True)]
        groups += [first.groups.get(row, row)] * len(ours)
    if not differences:
        return MeasurePair(kind, name, first, second, None, None)
    _, numbers = np.unique(groups, return_inverse=True)
    bounds = _BOUNDS.get(first.unit)
    (found,) = estimate_means(
        np.array(differences)[:, None], numbers.astype(np.int64), np.zeros(1), [bounds], seed=seed
    )
    return MeasurePair(kind, name, first, second, found, rows)
