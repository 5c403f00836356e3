"""What rows are like: repeated ones, the same question in training and validation, lengths, a few to look at."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
"""In percent."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """How many rows say again what another says. `example`: places of the first such pair, the earlier row first."""

    rows: int = 0
    example: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Validation rows that training knows: by the first user message (white space aside), or by all that they say."""

    questions: Repeats = field(default_factory=Repeats)
    conversations: Repeats = field(default_factory=Repeats)


@dataclass(frozen=True, slots=True)
class Bin:
    """One bar of a histogram: `rows` rows have `start` tokens or more, and fewer than `end`."""

    start: int
    end: int
    rows: int


def duplicates(digests: NDArray[np.bytes_], place: Callable[[int], str]) -> Repeats:
    """The rows whose digest is that of an earlier one. `place`: where a row stands, in words."""
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    repeating = np.flatnonzero(first[group] != np.arange(len(digests)))
    if not len(repeating):
        return Repeats()
    return Repeats(len(repeating), (place(int(first[group[repeating[0]]])), place(int(repeating[0]))))


def shared(
    training: NDArray[np.bytes_],
    validation: NDArray[np.bytes_],
    training_place: Callable[[int], str],
    validation_place: Callable[[int], str],
) -> Repeats:
    """The validation rows whose digest a training row has; the example names the training row first."""
    known, first = np.unique(training, return_index=True)
    found = np.flatnonzero(np.isin(validation, known))
    if not len(found):
        return Repeats()
    same = first[np.searchsorted(known, validation[found[0]])]
    return Repeats(len(found), (training_place(int(same)), validation_place(int(found[0]))))


def quantiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    """Percent -> the least length that at least so many percent of the rows don't exceed; empty without rows."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, [percent / 100 for percent in QUANTILES], method="inverted_cdf")
    return {str(percent): int(value) for percent, value in zip(QUANTILES, values, strict=True)}


def histogram(lengths: NDArray[np.int32], bars: int = 10) -> list[Bin]:
    """At most about `bars` bins of one round width over 99% of the rows; the few longer ones share a last, wide bin."""
    if not len(lengths):
        return []
    shortest, longest = int(lengths.min()), int(lengths.max())
    usual = int(np.quantile(lengths, 0.99, method="inverted_cdf"))
    width = next(
        width
        for exponent in range(20)
        for width in (10**exponent, 2 * 10**exponent, 5 * 10**exponent)
        if width * bars > usual - shortest
    )
    edges = list(range(shortest // width * width, usual + width + 1, width))
    if longest >= edges[-1]:
        edges.append(longest + 1)
    counts, _ = np.histogram(lengths, edges)
    return [Bin(*bin) for bin in zip(edges[:-1], edges[1:], counts.tolist(), strict=True)]


def choose_examples(with_system: Sequence[bool], seed: int, count: int = 5) -> list[int]:
    """`count` rows to look at, by number and in order: with and without a system message, if there are both."""
    chance = random.Random(f"examples {seed}")
    chosen = chance.sample(range(len(with_system)), min(count, len(with_system)))
    for kind in (True, False):
        if chosen and kind in with_system and all(with_system[row] is not kind for row in chosen):
            chosen[-1] = chance.choice([row for row, has in enumerate(with_system) if has is kind])
    return sorted(chosen)
