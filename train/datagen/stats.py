"""Statistics of a run, shared by SYSGEN and the collection: counted row by row, independent of the clock.

The same results give the same facts, whether they came in one start or in many.
"""

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from train.datagen.stage_client import RowInProgress
from train.datagen.usage import Usage
from train.formatting import format_count
from train.llm.failures import NO_ANSWER, FailureReasons

LONGEST_SHOWN = 1_500
"""Characters of a text in the report's samples."""


class RunStats(ABC):
    """Counts that every run has. Subclasses add those of their results."""

    def __init__(self) -> None:
        self.rows = self.written = 0
        """Source rows that are done, and rows that were written from them."""
        self.drop_counts: Counter[str] = Counter()
        """Dropped source rows by reason."""
        self.unanswered = FailureReasons()
        self.events: Counter[str] = Counter()
        self.usage: dict[str, Usage] = {}
        """By stage."""

    def add_row(self, row: RowInProgress) -> None:
        """Count one source row with its events and usage."""
        self.rows += 1
        self.events.update(row.events)
        for stage, usage in row.usage.items():
            self.usage.setdefault(stage, Usage()).merge(usage)

    def add_drop(self, counts: Counter[str], reason: str, detail: str) -> None:
        """Count something dropped in `counts`. `detail`: the server's error if the reason is NO_ANSWER."""
        counts[reason] += 1
        if reason == NO_ANSWER:
            self.unanswered.add(detail)

    def requests_of(self, stage: str) -> int:
        """Return the number of answers that a stage got."""
        return self.usage[stage].requests if stage in self.usage else 0

    def usage_facts(self, stages: Iterable[str]) -> dict[str, dict[str, float]]:
        """Return the usage of the stages that got answers, in the given order, for report.json."""
        return {stage: asdict(self.usage[stage]) for stage in stages if stage in self.usage}

    def drop_reasons(self) -> Mapping[str, int]:
        """Return how often each reason dropped something."""
        return self.drop_counts

    @staticmethod
    def format_drops(label: str, counts: Mapping[str, int], total: int) -> list[str]:
        """Return a line for each reason, the most frequent first."""
        return [
            f"{label}: {count:,} ({count / total:.1%}): {reason}" for reason, count in Counter(counts).most_common()
        ]

    @abstractmethod
    def summary(self, time: str) -> list[str]:
        """Return the lines that a command prints at its end. `time`: duration of this start."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """Return a line for each stage most of whose verdicts were unread."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return all figures as plain values, for report.json."""


class SeededSample:
    """Sample of up to `size` items, those with the lowest hashes of seed and number: the same in every run."""

    def __init__(self, size: int, seed: str, digest_size: int) -> None:
        self._size, self._seed, self._digest_size = size, seed, digest_size
        self._heap: list[tuple[int, int, Any]] = []

    def add(self, number: int, make_item: Callable[[], Any]) -> None:
        """Offer item `number`; `make_item` is called only if the item joins the sample."""
        digest = hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=self._digest_size).digest()
        rank = (-int.from_bytes(digest), number)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (*rank, make_item()))
        elif rank > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (*rank, make_item()))

    def items(self) -> list[Any]:
        """Return the sampled items in the order of their numbers."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[1])]


def sort_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts above 0, the highest first, equal ones by name."""
    return {name: count for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count}


def truncate(text: str, length: int = LONGEST_SHOWN) -> str:
    """Return the first `length` characters of a text, followed by `...` if there are more."""
    return text if len(text) <= length else f"{text[:length]}..."


def truncate_line(text: str) -> str:
    """Return the first 200 characters of a text as one line, for the details of dropped rows."""
    return truncate(" ".join(text.split()), 200)


def unread_warning(what: str, unread: int, asked: int, consequence: str) -> list[str]:
    """Return one line if more than half of the verdicts were unread, else none.

    Args:
        what: the stage or setting that asked; the line starts with it.
        unread, asked: numbers of verdicts.
        consequence: what was done with the rows, and what to do now.
    """
    if 2 * unread <= asked:
        return []
    verdicts = format_count(asked, "verdict")
    return [f"{what}: {unread:,} of {verdicts} could not be read ({unread / asked:.0%}). {consequence}"]
