"""Text of figures with their intervals."""

from train.resampling import Estimate


def format_estimate(
    value: float,
    low: float | None,
    high: float | None,
    missing: str = "",
    *,
    scale: float = 1,
    digits: int = 1,
    sign: str = "",
    unit: str = "",
) -> str:
    """Return `12.3 % [10.0, 14.5]`, or `50.0 % (n = 2)` with the reason for a missing interval.

    Args:
        value: the figure, with the bounds `low` and `high` of its interval; None without one.
        low: lower bound.
        high: upper bound.
        missing: the reason for a missing interval; empty = none is shown.
        scale: factor of all three numbers, such as 100 for percent.
        digits: decimal places.
        sign: "+" shows the sign of positive numbers too.
        unit: text after the value, with its blank.
    """
    spec = f"{sign}.{digits}f"
    text = f"{scale * value:{spec}}{unit}"
    if low is None or high is None:
        return f"{text} ({missing})" if missing else text
    return f"{text} [{scale * low:{spec}}, {scale * high:{spec}}]"


def format_share(share: Estimate) -> str:
    """Return a share in percent: `12.3 % [10.0, 14.5]`."""
    return format_estimate(share.mean, share.low, share.high, share.missing, scale=100, unit=" %")


def format_points(difference: Estimate) -> str:
    """Return a difference of two shares in points, with its sign: `+2.3 [-0.4, 5.1]`."""
    return format_estimate(difference.mean, difference.low, difference.high, difference.missing, scale=100, sign="+")
