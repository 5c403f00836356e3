"""Intervals of constant and small samples, compared with an inverted score test."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from train.resampling import (
    DIFFERENCE_BOUNDS,
    MIN_GROUPS,
    SHARE_BOUNDS,
    estimate_mean_of_shares,
    estimate_means,
    estimate_share,
    explain_missing_intervals,
    wilson_interval,
)

Z = NormalDist().inv_cdf(0.975)


def last_accepted(share: float, of: int, edge: float) -> float:
    """Find the last true share towards `edge` that is at most 1.96 standard errors from `share`, by bisection."""
    inside, outside = share, edge
    for _ in range(80):
        middle = (inside + outside) / 2
        rejected = (share - middle) ** 2 * of > Z**2 * middle * (1 - middle)
        inside, outside = (inside, middle) if rejected else (middle, outside)
    return inside


@pytest.mark.parametrize(("share", "of"), [(0, 6), (1, 6), (1, 10), (0, 36), (0.5, 8), (1 / 30, 30), (137.5 / 138, 36)])
def test_wilsons_interval_contains_the_shares_that_the_score_test_accepts(share: float, of: int) -> None:
    low, high = wilson_interval(share, of)
    expected = tuple(last_accepted(share, of, edge) for edge in (0.0, 1.0))
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert high - low > 0.05


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("bounds", [SHARE_BOUNDS, DIFFERENCE_BOUNDS, (1.0, 5.0), None])
def test_few_rows_have_no_interval(rows: int, bounds: tuple[float, float] | None) -> None:
    (estimate,) = estimate_means(np.ones((rows, 1)), np.arange(rows), np.zeros(1), [bounds])
    assert (estimate.mean, estimate.low, estimate.high, estimate.groups) == (1, None, None, rows)
    assert estimate.missing == f"n = {rows}"
    assert explain_missing_intervals(f"100 % ({estimate.missing})") == [
        "(n = ...): too few rows for an interval, which needs at least 6."
    ]
    assert explain_missing_intervals("100 % [72.2, 100.0]") == []


def test_the_minimum_of_groups_is_the_smallest_for_which_a_sign_test_can_be_significant() -> None:
    """Flip the signs of equal values: with five, 2 of 32 results are as extreme; with six, 2 of 64."""
    for groups in (MIN_GROUPS - 1, MIN_GROUPS):
        extreme = sum(abs(sum(signs)) == groups for signs in itertools.product((1, -1), repeat=groups))
        assert (extreme / 2**groups < 0.05) is (groups == MIN_GROUPS)


@pytest.mark.parametrize("constant", [0.0, 1.0])
@pytest.mark.parametrize(("groups", "of_each"), [(6, 1), (40, 1), (40, 3)])
def test_a_constant_share_has_wilsons_interval_of_its_groups(constant: float, groups: int, of_each: int) -> None:
    (estimate,) = estimate_means(
        np.full((groups * of_each, 1), constant), np.repeat(np.arange(groups), of_each), np.zeros(1), [SHARE_BOUNDS]
    )
    # Inverted score test: high = z^2 / (n + z^2).
    width = Z**2 / (groups + Z**2)
    assert (estimate.low, estimate.high) == pytest.approx((0, width) if constant == 0 else (1 - width, 1))
    assert estimate.interval == "wilson"


def test_one_differing_group_widens_the_interval() -> None:
    values = np.ones(120)
    groups = np.repeat(np.arange(40), 3)
    alike = estimate_share(values.tolist(), groups.astype(str).tolist())
    values[7] = 0
    one_off = estimate_share(values.tolist(), groups.astype(str).tolist())
    assert one_off.high - one_off.low > alike.high - alike.low > 0.08
    assert (one_off.low, one_off.high) == wilson_interval(119 / 120, 40)


def test_intervals_of_shares_cover_the_truth_where_a_bootstrap_would_not() -> None:
    """Sum the probabilities of all outcomes of 20 rows whose interval contains the true share of 0.95."""
    truth, of = 0.95, 20

    def covered(ends: list[tuple[float, float]]) -> float:
        return sum(
            math.comb(of, count) * truth**count * (1 - truth) ** (of - count)
            for count, (low, high) in enumerate(ends)
            if low <= truth <= high
        )

    columns = [np.array([1.0] * count + [0.0] * (of - count))[:, None] for count in range(of + 1)]
    rows = np.arange(of)
    ours = [estimate_means(column, rows, np.zeros(1), [SHARE_BOUNDS], permutations=1)[0] for column in columns]
    plain = [estimate_means(column, rows, np.zeros(1), permutations=1)[0] for column in columns]
    assert covered([(estimate.low, estimate.high) for estimate in ours]) > 0.92
    ends = [
        (estimate.mean, estimate.mean) if estimate.low is None else (estimate.low, estimate.high) for estimate in plain
    ]
    assert covered(ends) < 0.70


def test_intervals_always_have_a_width() -> None:
    """Equal values, groups with equal means, and sums that differ only by rounding."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 2)
    samples = {
        "alike": np.full(16, 0.1),
        "opposite in each group": np.tile([0.0, 1.0], 8),
        "both halves": np.full(16, 0.5),
        "rounding": 0.3 + 1e-17 * rng.integers(0, 2, 16),
    }
    for name, values in samples.items():
        for bounds in (SHARE_BOUNDS, DIFFERENCE_BOUNDS, (1.0, 5.0), None):
            column = values[:, None] + (3 if bounds == (1.0, 5.0) else 0)
            (estimate,) = estimate_means(column, groups, np.zeros(1), [bounds])
            if bounds is None:
                assert (estimate.low, estimate.high, estimate.missing) == (None, None, "all alike"), name
            else:
                assert estimate.high - estimate.low > 0.3, name
                assert bounds[0] <= estimate.low <= estimate.mean <= estimate.high <= bounds[1]


def tangos_score(pairs: int, better: int, worse: int, difference: float) -> float:
    """Return the distance of the pairs from `difference` in standard errors (Tango 1998, equations 4 to 6)."""
    a, c = 2 * pairs, -worse * difference * (1 - difference)
    b = -better - worse + (2 * pairs - better + worse) * difference
    nuisance = (math.sqrt(b**2 - 4 * a * c) - b) / (2 * a)
    spread = math.sqrt(pairs * (2 * nuisance + difference * (1 - difference)))
    return (better - worse - pairs * difference) / spread


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, True, False), (0.0, True, True), (-1.0, False, True)])
def test_equal_differences_have_tangos_interval(value: float, low: bool, high: bool) -> None:
    pairs = 12
    (estimate,) = estimate_means(np.full((pairs, 1), value), np.arange(pairs), np.zeros(1), [DIFFERENCE_BOUNDS])
    better, worse = pairs * (value > 0), pairs * (value < 0)
    for end, open_end, sign in ((estimate.low, low, 1), (estimate.high, high, -1)):
        if open_end:
            assert sign * tangos_score(pairs, better, worse, end) == pytest.approx(Z, abs=1e-6)
        else:
            assert end == value


def test_the_interval_of_a_mean_of_shares_equals_a_plain_bootstrap_over_groups() -> None:
    """Group g has one row in the first share and three equal rows in the second; 40 of 60 groups have the latter."""
    rng = np.random.default_rng(1)
    groups = [f"group {number}" for number in range(60)]
    first = {group: int(rng.random() < 0.7) for group in groups}
    second = {group: [int(rng.random() < 0.3)] * 3 for group in groups[:40]}
    in_second = [group for group in groups[:40] for _ in range(3)]
    estimate = estimate_mean_of_shares(
        [
            ([first[group] for group in groups], groups),
            ([value for values in second.values() for value in values], in_second),
        ]
    )
    values = [value for values in second.values() for value in values]
    assert estimate.mean == pytest.approx((sum(first.values()) / 60 + sum(values) / 120) / 2)
    means = []
    for _ in range(4_000):
        drawn = rng.choice(groups, size=60)
        of_first = [first[group] for group in drawn]
        of_second = [value for group in drawn for value in second.get(group, [])]
        means.append((sum(of_first) / len(of_first) + sum(of_second) / len(of_second)) / 2)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.02)
    assert high - low > 0.15
    assert (estimate.interval, estimate.groups) == ("bootstrap", 60)


def test_a_mean_of_constant_shares_has_the_mean_of_their_intervals() -> None:
    shares = [([1.0] * 8, [f"a{number}" for number in range(8)]), ([0.0] * 20, [f"b{number}" for number in range(20)])]
    estimate = estimate_mean_of_shares(shares)
    assert (estimate.mean, estimate.interval) == (0.5, "bounded")
    assert estimate.low == pytest.approx((wilson_interval(1, 8)[0] + 0) / 2)
    assert estimate.high == pytest.approx((1 + wilson_interval(0, 20)[1]) / 2)
    few = estimate_mean_of_shares([shares[1], ([1.0] * 9, ["a"] * 4 + ["b"] * 5)])
    assert (few.low, few.missing) == (None, "n = 2")
