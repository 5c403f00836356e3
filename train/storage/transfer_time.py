"""Longest expected time to write or read files on a shared disk: the timeout of ranks that wait for it."""

_RATE = 200e6
"""Bytes per second of a slow shared disk: a sixth of what a network of 10 Gbit/s carries."""
_MINIMUM = 1_800
"""Seconds; the default of transformers' ddp_timeout."""


def longest_transfer(count: int) -> int:
    """Return the seconds to allow for `count` bytes, at least 1,800: 988 GB (a checkpoint of a 70B) take 4,940."""
    return max(_MINIMUM, round(count / _RATE))
