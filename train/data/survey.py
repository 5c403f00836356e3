"""What rows are like: repeated ones, the same question in training and validation, lengths, a few to look at."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from train.data.formats import Conversation

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
"""In percent."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """How many rows say again what another says. `example`: places of the first such pair, the earlier row first."""

    rows: int = 0
    example: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one row says, as 16 bytes each, and where it stands."""

    conversation: bytes
    question: bytes
    place: str


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What the rows of one part say. A row that its source's weight repeats is one row here.

    `system_messages`: how many different ones there are.
    """

    rows: list[Fingerprint] = field(default_factory=list)
    system_messages: int = 0

    def duplicates(self) -> Repeats:
        """The rows whose messages and tools are exactly those of an earlier one."""
        seen: dict[bytes, str] = {}
        pairs: list[tuple[str, str]] = []
        for row in self.rows:
            if row.conversation in seen:
                pairs.append((seen[row.conversation], row.place))
            else:
                seen[row.conversation] = row.place
        return Repeats(len(pairs), pairs[0] if pairs else None)


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


def has_system(conversation: Conversation) -> bool:
    """Whether a system message stands anywhere in the row."""
    return any(message["role"] == "system" for message in conversation.messages)


def fingerprints(conversations: Iterable[Conversation]) -> Fingerprints:
    """Digests of all rows, each object once."""
    seen: set[int] = set()
    systems: set[bytes] = set()
    rows: list[Fingerprint] = []
    for conversation in conversations:
        if id(conversation) in seen:
            continue
        seen.add(id(conversation))
        messages = conversation.messages
        systems.update(_digest(message["content"]) for message in messages if message["role"] == "system")
        whole = json.dumps([messages, conversation.tools], ensure_ascii=False, sort_keys=True)
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        rows.append(Fingerprint(_digest(whole), _digest(" ".join(first["content"].split())), conversation.place))
    return Fingerprints(rows, len(systems))


def overlap(training: Fingerprints, validation: Fingerprints) -> Overlap:
    """Which rows of validation are in training too; each example names the training row first."""

    def shared(name: str) -> Repeats:
        places: dict[bytes, str] = {}
        for row in training.rows:
            places.setdefault(getattr(row, name), row.place)
        known = [row for row in validation.rows if getattr(row, name) in places]
        return Repeats(len(known), (places[getattr(known[0], name)], known[0].place) if known else None)

    return Overlap(shared("question"), shared("conversation"))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
