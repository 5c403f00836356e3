"""Intervals by a plain loop, to compare those of train/resampling.py with."""

import random


def plain_interval(values: list[list[float]], seed: int) -> tuple[float, float]:
    """The 95 % interval of means over resampled prompts, each with all of its numbers."""
    rng = random.Random(seed)
    means = []
    for _ in range(2_000):
        drawn = [number for _ in values for number in rng.choice(values)]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[50], means[-50]
