"""Means of clustered rows with 95 % intervals (cluster bootstrap, Wilson) and p values (sign-flip tests).

Rows of one instruction are correlated (siblings differ only in the system message), so instructions, not rows, are
resampled and have their signs flipped. The interval of a column is the first of these that applies:

- fewer than MIN_GROUPS groups: none, as no interval would have 95 % coverage;
- a share of independent rows (each 0 or 1 and a group of its own): Wilson's interval;
- a share that differs from 0 or 1 in fewer than MIN_GROUPS groups: Wilson's interval with the number of groups as its
  count, as if the rows of a group were always equal. A bootstrap without differing groups would yield [1, 1];
- equal values with bounds: the value, moved towards each bound as far as Wilson's interval allows for unseen groups.
  For paired differences of shares this is Tango's interval (Statistics in Medicine 17, 1998) where no pair differs;
- equal values without bounds: none;
- otherwise: the percentile bootstrap over groups, which is too narrow with fewer than about 20 of them.
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
"""Minimum number of groups for an interval. Even the full range of 5 values contains the median only 15 times in 16
(1 - 2 / 2^5, below 95 %), and no flipping of 5 signs has p < 0.05."""
SHARE_BOUNDS, DIFFERENCE_BOUNDS = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of the values of a column."""
Bounds = tuple[float, float] | None
IntervalMethod = Literal["bootstrap", "wilson", "bounded", "none: too few", "none: all alike"]
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_MAX_DRAWS = 1 << 22
"""Random numbers drawn at a time: with many instructions the full table of resamples would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval and p value.

    - `low`, `high`: bounds of the interval; None without one.
    - `p`: two-sided, by flipping the sign of each instruction's sum; at least 1 / (permutations + 1).
    - `groups`: number of instructions, or of other independent groups.
    - `interval`: method of the interval, or why there is none.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    groups: int
    interval: IntervalMethod

    @property
    def missing(self) -> str:
        """Reason for a missing interval (see `missing_interval_reason`)."""
        return missing_interval_reason(self.interval, self.groups)

    def record(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
        return asdict(self)


def missing_interval_reason(method: str, groups: int) -> str:
    """Return `n = 2` or `all alike`, to print instead of an interval; empty where there is one."""
    return {"none: too few": f"n = {groups}", "none: all alike": "all alike"}.get(method, "")


def explain_missing_intervals(text: str, unit: str = "rows") -> list[str]:
    """Return a line for each reason for a missing interval in `text`; `unit`: what n counts."""
    lines = []
    if "(n = " in text:
        lines.append(f"(n = ...): too few {unit} for an interval, which needs at least {MIN_GROUPS}.")
    if "(all alike)" in text:
        lines.append("(all alike): all values are equal, so their spread can't be estimated.")
    return lines


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share of `count` independent rows: all shares that a score test accepts."""
    weight = _Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def estimate_share(values: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Estimate the share of rows whose value is 1; rows of one group are correlated."""
    _, numbers = np.unique(groups, return_inverse=True)
    column = np.array(values, np.float64)[:, None]
    (estimate,) = estimate_means(column, numbers.astype(np.int64), np.zeros(1), [SHARE_BOUNDS], permutations=0)
    return estimate


def estimate_mean_of_shares(
    shares: Sequence[tuple[Sequence[float], Sequence[str]]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Estimate the mean of several shares: each has the same weight, whatever its number of rows.

    Groups are resampled together, as a group may have rows in several shares, and each share is computed anew. The
    interval is missing if a share has fewer than MIN_GROUPS groups. If no share varies, it is the mean of the intervals
    of equal values with bounds (see above).

    Args:
        shares: for each share the values of its rows (0 or 1) and their groups.
        seed: seed of the resamples.
        resamples: number of bootstrap resamples.
    """
    numbers = {group: number for number, group in enumerate(sorted({group for _, names in shares for group in names}))}
    sums, sizes = np.zeros((len(numbers), len(shares))), np.zeros((len(numbers), len(shares)))
    for column, (values, names) in enumerate(shares):
        rows = [numbers[name] for name in names]
        np.add.at(sums[:, column], rows, values)
        np.add.at(sizes[:, column], rows, 1)
    of_share = sums.sum(0) / sizes.sum(0)
    mean, groups = float(of_share.mean()), (sizes > 0).sum(0)
    if groups.min() < MIN_GROUPS:
        return Estimate(mean, None, None, 1.0, int(groups.min()), "none: too few")
    if np.isin(of_share, SHARE_BOUNDS).all():
        unseen = np.array([wilson_interval(0.0, int(count))[1] for count in groups])
        low, high = (of_share * (1 - unseen)).mean(), (of_share + unseen * (1 - of_share)).mean()
        return Estimate(mean, float(low), float(high), 1.0, len(numbers), "bounded")
    rng = np.random.default_rng(seed)
    count = len(numbers)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a resample may hold no row of a small share: it is left out
        resampled = ((weights @ sums) / (weights @ sizes)).mean(1)
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), 1.0, count, "bootstrap")


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
    """Estimate the mean of each column of `values` over all rows, which have equal weights.

    Args:
        values: shape [rows, measures].
        instructions: number of each row's instruction, shape [rows].
        no_effect: value of each column under the null hypothesis, shape [measures].
        bounds: smallest and largest possible value of each column; None = unbounded.
        seed: seed of resamples and permutations.
        resamples: number of bootstrap resamples.
        permutations: number of sign flips.
    """
    _, group = np.unique(instructions, return_inverse=True)
    count = int(group.max()) + 1
    sizes = np.bincount(group, minlength=count).astype(np.float64)
    sums = np.stack([np.bincount(group, column, minlength=count) for column in values.T], axis=1)
    means = (sums.sum(0) / sizes.sum()).tolist()
    rng = np.random.default_rng(seed)
    bootstrap: list[tuple[float, float]] = [(math.nan, math.nan)] * len(means)
    if count >= MIN_GROUPS:
        resampled = np.concatenate(
            [
                (weights @ sums) / (weights @ sizes)[:, None]
                for size in _chunks(resamples, count)
                for weights in [rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)]
            ]
        )
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
        bootstrap = list(zip(low, high, strict=True))
    effects = sums - sizes[:, None] * no_effect
    # The tolerance counts sums that differ only by rounding as equally extreme.
    observed = np.abs(effects.sum(0)) - 1e-9 * np.abs(effects).sum(0)
    as_extreme = np.zeros(len(means), np.int64)
    for size in _chunks(permutations, count):
        signs = rng.integers(0, 2, size=(size, count), dtype=np.int8).astype(np.float64) * 2 - 1
        as_extreme += (np.abs(signs @ effects) >= observed).sum(0)
    p = ((1 + as_extreme) / (1 + permutations)).tolist()
    return [
        Estimate(means[column], *interval, p[column], count, method)
        for column, limits in enumerate(bounds or [None] * len(means))
        for interval, method in [_interval(values[:, column], group, means[column], limits, bootstrap[column])]
    ]


def _interval(
    values: NDArray[np.float64], group: NDArray[np.int64], mean: float, bounds: Bounds, bootstrap: tuple[float, float]
) -> tuple[tuple[float | None, float | None], IntervalMethod]:
    """Return the interval of one column and its method; `bootstrap`: the bootstrap interval."""
    groups = int(group.max()) + 1
    if groups < MIN_GROUPS:
        return (None, None), "none: too few"
    if bounds == SHARE_BOUNDS:
        mean = min(max(mean, 0.0), 1.0)  # rounding may push a mean of ones above 1
        differing = len(np.unique(group[values != round(mean)]))
        if groups == len(values) and np.isin(values, (0, 1)).all():
            return wilson_interval(mean, groups), "wilson"
        if differing < MIN_GROUPS:
            return wilson_interval(mean, groups), "wilson"
    # Rounding may give the bootstrap of equal values a small width.
    if np.ptp(values) <= 1e-9 * max(abs(mean), 1e-300) or bootstrap[1] - bootstrap[0] <= 1e-9 * np.ptp(values):
        if bounds is None:
            return (None, None), "none: all alike"
        unseen = wilson_interval(0.0, groups)[1]
        return (mean + unseen * (bounds[0] - mean), mean + unseen * (bounds[1] - mean)), "bounded"
    return bootstrap, "bootstrap"


def _chunks(draws: int, count: int) -> list[int]:
    """Split `draws` into chunks that fit in memory."""
    chunk = max(_MAX_DRAWS // count, 1)
    return [min(chunk, draws - start) for start in range(0, draws, chunk)]
