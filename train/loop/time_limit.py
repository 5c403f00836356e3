"""Time limit of a run, `save.time_limit`, in the notation of Slurm."""

import re
from collections.abc import Iterator

from train.recipe import TIME, SaveSection


def parse_time_limit(time_limit: str) -> int:
    """Return the seconds of `90:00`, `11:30:00` or `2-00:00:00`."""
    match = re.match(TIME, time_limit)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def time_conflicts(settings: SaveSection) -> Iterator[str]:
    """Yield errors in the times of a recipe."""
    limit = settings.time_limit
    if limit is not None and parse_time_limit(limit) <= settings.seconds_before_end:
        yield (
            f"save.time_limit: {limit} must be longer than save.seconds_before_end ({settings.seconds_before_end}): "
            "the run would stop after its first step. Write a longer limit, or fewer seconds."
        )
