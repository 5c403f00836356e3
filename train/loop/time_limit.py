"""Time limit of a run, `save.time_limit`, in the notation of Slurm."""

import re
from collections.abc import Iterator

from train.recipe import TIME, SaveSection


def seconds_of(time_limit: str) -> int:
    """Seconds of `90:00`, `11:30:00` or `2-00:00:00`, as Slurm writes times."""
    found = re.match(TIME, time_limit)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def time_conflicts(settings: SaveSection) -> Iterator[str]:
    """What is wrong with the times of a recipe, in words."""
    limit = settings.time_limit
    if limit is not None and seconds_of(limit) <= settings.seconds_before_end:
        yield (
            f"save.time_limit: {limit} is no more than save.seconds_before_end ({settings.seconds_before_end}), so the "
            "run would stop after its first step. Write a longer limit, or fewer seconds."
        )
