"""Means over rows that come in groups, how sure they are, and whether they may be noise.

Rows of one instruction are correlated (siblings share all but the system message), so it is instructions that are drawn
again and whose signs are flipped, not rows. Both need no distribution; with few instructions (below some 20) a
percentile bootstrap is too narrow, and the report says how many there were.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
PERMUTATIONS = 9_999
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22
"""Numbers drawn at a time: with many instructions the whole table of resamples would take gigabytes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its interval, and how probable one so far from no effect would be if there were none.

    `low`, `high`: 95 %, percentile bootstrap over instructions; None where there is one instruction alone. `p`:
    two-sided, by flipping the sign of each instruction's sum; never below 1 / (permutations + 1).
    """

    mean: float
    low: float | None
    high: float | None
    p: float

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimates(
    values: NDArray[np.float64],
    instructions: NDArray[np.int64],
    no_effect: NDArray[np.float64],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
) -> list[Estimate]:
    """One estimate for each column of `values` [rows, measures], rows weighing alike.

    `instructions`: the number of each row's instruction [rows]. `no_effect`: what a column is where nothing has an
    effect [measures]; the test is of that.
    """
    _, group = np.unique(instructions, return_inverse=True)
    count = int(group.max()) + 1
    sizes = np.bincount(group, minlength=count).astype(np.float64)
    sums = np.stack([np.bincount(group, column, minlength=count) for column in values.T], axis=1)
    means = sums.sum(0) / sizes.sum()
    chance = np.random.default_rng(seed)
    low = high = [None] * len(means)
    if count > 1:
        found = np.concatenate(
            [
                (drawn @ sums) / (drawn @ sizes)[:, None]
                for size in _pieces(resamples, count)
                for drawn in [chance.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)]
            ]
        )
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
    effects = sums - sizes[:, None] * no_effect
    # Sums of the same numbers in another order differ by rounding, and are no less extreme for it.
    observed = np.abs(effects.sum(0)) - 1e-9 * np.abs(effects).sum(0)
    as_extreme = np.zeros(len(means), np.int64)
    for size in _pieces(permutations, count):
        signs = chance.integers(0, 2, size=(size, count), dtype=np.int8).astype(np.float64) * 2 - 1
        as_extreme += (np.abs(signs @ effects) >= observed).sum(0)
    p = (1 + as_extreme) / (1 + permutations)
    return [Estimate(*figures) for figures in zip(means.tolist(), low, high, p.tolist(), strict=True)]


def _pieces(draws: int, count: int) -> list[int]:
    """`draws` in portions that fit in memory."""
    portion = max(_DRAWS_AT_ONCE // count, 1)
    return [min(portion, draws - start) for start in range(0, draws, portion)]
