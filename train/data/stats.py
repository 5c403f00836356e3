"""Statistics of rows: duplicates, overlap of training and validation, lengths, rows to look at."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True, slots=True)
class Repeats:
    """The number of rows that repeat another one. `example`: the places of the first such pair, earlier row first."""

    rows: int = 0
    example: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Validation rows that are in training too: by first user message (white space aside), or by all messages."""

    questions: Repeats = field(default_factory=Repeats)
    conversations: Repeats = field(default_factory=Repeats)


@dataclass(frozen=True, slots=True)
class Bin:
    """One bar of a histogram: the number of rows with `start` to `end` - 1 tokens."""

    start: int
    end: int
    rows: int


def find_duplicates(digests: NDArray[np.bytes_], place: Callable[[int], str]) -> Repeats:
    """Count the rows whose digest an earlier row has. `place`: row number -> its place."""
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    repeating = np.flatnonzero(first[group] != np.arange(len(digests)))
    if not len(repeating):
        return Repeats()
    return Repeats(len(repeating), (place(int(first[group[repeating[0]]])), place(int(repeating[0]))))


def find_shared(
    training: NDArray[np.bytes_],
    validation: NDArray[np.bytes_],
    training_place: Callable[[int], str],
    validation_place: Callable[[int], str],
) -> Repeats:
    """Count the validation rows whose digest a training row has; the example names the training row first."""
    distinct, first = np.unique(training, return_index=True)
    shared = np.flatnonzero(np.isin(validation, distinct))
    if not len(shared):
        return Repeats()
    twin = first[np.searchsorted(distinct, validation[shared[0]])]
    return Repeats(len(shared), (training_place(int(twin)), validation_place(int(shared[0]))))


def percentiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    """Return percentile -> row length, as `PERCENTILES` lists them; empty without rows.

    Percentile p is the smallest length that at least p percent of the rows don't exceed.
    """
    if not len(lengths):
        return {}
    values = np.quantile(lengths, [percent / 100 for percent in PERCENTILES], method="inverted_cdf")
    return {str(percent): int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def format_percentiles(values: Mapping[str, int]) -> str:
    """Return `min 32, p50 399, max 1,055`."""
    names = {"0": "min", "100": "max"}
    return ", ".join(f"{names.get(percent, f'p{percent}')} {value:,}" for percent, value in values.items())


def histogram(lengths: NDArray[np.int32], bars: int = 10) -> list[Bin]:
    """Return about `bars` bins of one round width over 99% of the rows, and a wide last bin for the longer ones."""
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
    """Return the numbers of `count` rows, in order: both with and without a system message where both exist."""
    rng = random.Random(f"examples {seed}")
    chosen = rng.sample(range(len(with_system)), min(count, len(with_system)))
    for kind in (True, False):
        if chosen and kind in with_system and all(with_system[row] is not kind for row in chosen):
            chosen[-1] = rng.choice([row for row, has_system in enumerate(with_system) if has_system is kind])
    return sorted(chosen)
