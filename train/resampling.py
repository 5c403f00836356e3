"""Means over rows that come in groups, their 95 % intervals, and whether they may be noise.

Rows of one instruction are correlated (siblings share all but the system message), so it is instructions that are drawn
again and whose signs are flipped, not rows. The interval of a column is, in this order:

- none below FEWEST groups, of which none would hold the truth 95 times in 100;
- of a share of independent rows (each 0 or 1, each a group of its own): Wilson's;
- of a share that fewer than FEWEST groups keep from being 0 or 1: Wilson's with the number of GROUPS as its count, as
  if the rows of a group were always alike. A bootstrap learns from groups that differ: without any it draws [1, 1];
- of other values with bounds that are all the same: that value, moved as far as Wilson's bound lets other groups move
  it. Of paired differences of shares it is Tango's interval (Statistics in Medicine 17, 1998) where no pair differs;
- of values without bounds that are all the same: none;
- else the percentile bootstrap over groups, which with few of them (below some 20) is too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
PERMUTATIONS = 9_999
LEVEL = 0.95
MIN_GROUPS = 6
"""Groups that an interval takes. Even the whole range of 5 values holds the median 15 times in 16 (1 - 2 / 2^5, below
95 %), and no flipping of 5 signs has p < 0.05."""
SHARE_BOUNDS, DIFFERENCE_BOUNDS = (0.0, 1.0), (-1.0, 1.0)
"""The least and the greatest that a value of a column can be."""
Bounds = tuple[float, float] | None
IntervalMethod = Literal["bootstrap", "wilson", "bounded", "none: too few", "none: all alike"]
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_DRAWS_AT_ONCE = 1 << 22
"""Numbers drawn at a time: with many instructions the whole table of resamples would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its interval, and how probable one so far from no effect would be if there were none.

    `low`, `high`: 95 %, None where there is none. `p`: two-sided, by flipping the sign of each instruction's sum; never
    below 1 / (permutations + 1). `groups`: how many instructions, or what else is independent. `interval`: how the
    interval was made, or why there is none.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    groups: int
    interval: IntervalMethod

    @property
    def missing(self) -> str:
        """Return the reason for a missing interval, as `missing_interval_reason` gives it."""
        return missing_interval_reason(self.interval, self.groups)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def missing_interval_reason(method: str, groups: int) -> str:
    """`n = 2` or `all alike`, to stand where an interval would; nothing where there is one."""
    return {"none: too few": f"n = {groups}", "none: all alike": "all alike"}.get(method, "")


def explain_missing_intervals(text: str, of: str = "rows") -> list[str]:
    """A line for each reason that `text` gives for a missing interval; `of`: what n counts."""
    lines = []
    if "(n = " in text:
        lines.append(f"(n = ...): too few {of} for an interval; it takes at least {MIN_GROUPS}.")
    if "(all alike)" in text:
        lines.append("(all alike): every value is the same, which says nothing of how far others would be from it.")
    return lines


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of `count` independent rows: the shares that a score test doesn't refuse."""
    weight = _Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def estimate_share(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """The share of rows whose value is 1, those of one group not independent of each other."""
    _, numbers = np.unique(groups, return_inverse=True)
    column = np.array(values, np.float64)[:, None]
    (found,) = estimate_means(column, numbers.astype(np.int64), np.zeros(1), [SHARE_BOUNDS], permutations=0)
    return found


def estimate_means(
    values: NDArray[np.float64],
    instructions: NDArray[np.int64],
    no_effect: NDArray[np.float64],
    bounds: Sequence[Bounds] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> list[Estimate]:
    """One estimate for each column of `values` [rows, measures], rows weighing alike.

    `instructions`: the number of each row's instruction [rows]. `no_effect`: what a column is where nothing has an
    effect [measures]; the test is of that. `bounds`: what a value of each column can be; None = anything.
    """
    _, group = np.unique(instructions, return_inverse=True)
    count = int(group.max()) + 1
    sizes = np.bincount(group, minlength=count).astype(np.float64)
    sums = np.stack([np.bincount(group, column, minlength=count) for column in values.T], axis=1)
    means = (sums.sum(0) / sizes.sum()).tolist()
    chance = np.random.default_rng(seed)
    drawn_again: list[tuple[float, float]] = [(math.nan, math.nan)] * len(means)
    if count >= MIN_GROUPS:
        found = np.concatenate(
            [
                (drawn @ sums) / (drawn @ sizes)[:, None]
                for size in _pieces(resamples, count)
                for drawn in [chance.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)]
            ]
        )
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
        drawn_again = list(zip(low, high, strict=True))
    effects = sums - sizes[:, None] * no_effect
    # Sums of the same numbers in another order differ by rounding, and are no less extreme for it.
    observed = np.abs(effects.sum(0)) - 1e-9 * np.abs(effects).sum(0)
    as_extreme = np.zeros(len(means), np.int64)
    for size in _pieces(permutations, count):
        signs = chance.integers(0, 2, size=(size, count), dtype=np.int8).astype(np.float64) * 2 - 1
        as_extreme += (np.abs(signs @ effects) >= observed).sum(0)
    p = ((1 + as_extreme) / (1 + permutations)).tolist()
    return [
        Estimate(means[column], *ends, p[column], count, method)
        for column, limits in enumerate(bounds or [None] * len(means))
        for ends, method in [_interval(values[:, column], group, means[column], limits, drawn_again[column])]
    ]


def _interval(
    values: NDArray[np.float64], group: NDArray[np.int64], mean: float, bounds: Bounds, bootstrap: tuple[float, float]
) -> tuple[tuple[float | None, float | None], IntervalMethod]:
    """The ends of one column's interval, and how they were found. `bootstrap`: what drawing groups again gives."""
    groups = int(group.max()) + 1
    if groups < MIN_GROUPS:
        return (None, None), "none: too few"
    if bounds == SHARE_BOUNDS:
        mean = min(max(mean, 0.0), 1.0)  # a mean of ones may be off by rounding
        differing = len(np.unique(group[values != round(mean)]))
        if groups == len(values) and np.isin(values, (0, 1)).all():
            return wilson_interval(mean, groups), "wilson"
        if differing < MIN_GROUPS:
            return wilson_interval(mean, groups), "wilson"
    # Rounding may leave the bootstrap of equal values a width of its own.
    if np.ptp(values) <= 1e-9 * max(abs(mean), 1e-300) or bootstrap[1] - bootstrap[0] <= 1e-9 * np.ptp(values):
        if bounds is None:
            return (None, None), "none: all alike"
        others = wilson_interval(0.0, groups)[1]
        return (mean + others * (bounds[0] - mean), mean + others * (bounds[1] - mean)), "bounded"
    return bootstrap, "bootstrap"


def _pieces(draws: int, count: int) -> list[int]:
    """`draws` in portions that fit in memory."""
    portion = max(_DRAWS_AT_ONCE // count, 1)
    return [min(portion, draws - start) for start in range(0, draws, portion)]
