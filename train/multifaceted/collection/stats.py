"""What a collection amounts to, in numbers: added up instruction by instruction, and in no way by the clock.

The same outcomes give the same facts, whether they came in one start or in many. Memory grows with the number of
different preferences alone, which are counted by their words, and by eight bytes a length.
"""

import hashlib
import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from train.datagen.drop_reasons import unread_warning
from train.datagen.text_units import split_words
from train.datagen.usage import Usage
from train.llm.failures import NO_ANSWER, FailureReasons
from train.multifaceted.collection.config import STAGES, CollectionConfig
from train.multifaceted.collection.hierarchy import DIMENSIONS, Hierarchy, normalize_words
from train.multifaceted.collection.prompts import PROMPT_VERSION
from train.multifaceted.collection.result import InstructionResult

SAMPLES = 5
COMPARED = 200
"""Instructions whose sibling messages are compared: ROUGE-L takes some 20 ms a pair."""
LONGEST_SHOWN = 1_500
MOST_FREQUENT = 10
LENGTHS = ("system", "prompt", "output")

_Ranked = list[tuple[int, int, Any]]


class CollectionStats:
    """Adds up outcomes."""

    def __init__(self, config: CollectionConfig, hierarchy: Hierarchy) -> None:
        self._config, self._hierarchy = config, hierarchy
        self.rows = self.instructions = self.instructions_written = self.sets = self.written = self.pairs = 0
        self.left_out: Counter[str] = Counter()
        self.sets_left_out: Counter[str] = Counter()
        self.unanswered = FailureReasons()
        self.events: Counter[str] = Counter()
        self.spent: dict[str, Usage] = {}
        self._drawn: Counter[tuple[str, str]] = Counter()
        self._written: Counter[tuple[str, str]] = Counter()
        self._preferences: dict[tuple[str, str], Counter[str]] = {}
        self._wording: dict[str, str] = {}
        self._lengths = {name: array("l") for name in LENGTHS}
        self._samples: _Ranked = []
        self._compared: _Ranked = []

    def add(self, result: InstructionResult, pairs: int = 0) -> None:
        """Count one instruction, of which so many pairs were made."""
        self.rows += 1
        self.pairs += pairs
        self.events.update(result.events)
        for stage, spent in result.spent.items():
            self.spent.setdefault(stage, Usage()).add_all(spent)
        for reason, detail in ((result.reason, result.detail), *((one.reason, one.detail) for one in result.sets)):
            if reason == NO_ANSWER:
                self.unanswered.add(detail)
        if result.reason is not None:
            self.left_out[result.reason] += 1
            return
        self.instructions += 1
        self.sets += len(result.sets)
        written = result.written
        self.written += len(written)
        self.instructions_written += bool(written)
        for one in result.sets:
            self._drawn.update((draw.sub.dimension, draw.sub.name) for draw in one.planned)
            if one.reason is not None:
                self.sets_left_out[one.reason] += 1
                continue
            for preference in one.preferences:
                where = (preference.dimension, preference.subdimension)
                self._written[where] += 1
                words = normalize_words(preference.preference)
                self._preferences.setdefault(where, Counter())[words] += 1
                self._wording.setdefault(words, preference.preference)
            for name, text in zip(LENGTHS, (one.system, result.instruction.prompt, one.output), strict=True):
                self._lengths[name].append(len(text))
        if written:
            self._keep(self._samples, SAMPLES, "sample", result, _shown(result))
            self._keep(self._compared, COMPARED, "compared", result, [one.system for one in written])

    def _keep(self, heap: _Ranked, most: int, purpose: str, result: InstructionResult, what: Any) -> None:
        """Keep `what` if its instruction is among those that the seed gives the lowest numbers."""
        number = result.instruction.number or 0
        digest = hashlib.blake2b(f"{self._config.seed} {purpose} {number}".encode(), digest_size=7).digest()
        entry = (-int.from_bytes(digest), number, what)
        if len(heap) < most:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def warnings(self) -> list[str]:
        """Return a line where the verdicts of the model's filter were mostly unread."""
        return unread_warning(
            "filter.model",
            self.events["screen: neither yes nor no, and kept"],
            self.spent["screen"].requests if "screen" in self.spent else 0,
            "These instructions were kept. The replies are in answers.sqlite under the stage `screen`: check that the "
            "model replies with yes or no, and that screen.max_tokens leaves room for it.",
        )

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for report.json."""
        return {
            "model": self._config.model,
            "prompt_version": PROMPT_VERSION,
            "rows": self.rows,
            "instructions": self.instructions,
            "instructions_written": self.instructions_written,
            "sets": self.sets,
            "sets_written": self.written,
            "pairs": self.pairs,
            "warnings": self.warnings(),
            "left_out": _sorted(self.left_out),
            "sets_left_out": _sorted(self.sets_left_out),
            "unanswered": self.unanswered.counts(),
            "events": _sorted(self.events),
            "coverage": {dimension: self._coverage(dimension) for dimension in DIMENSIONS},
            "similarity": similarity([texts for _, _, texts in sorted(self._compared, key=lambda one: one[1])]),
            "characters": {name: _spread(self._lengths[name]) for name in LENGTHS},
            "spent": {
                stage: {
                    "requests": self.spent[stage].requests,
                    "prompt_tokens": self.spent[stage].prompt_tokens,
                    "completion_tokens": self.spent[stage].completion_tokens,
                    "seconds": self.spent[stage].seconds,
                }
                for stage in STAGES
                if stage in self.spent
            },
            "samples": [shown for _, _, shown in sorted(self._samples, key=lambda one: one[1])],
        }

    def _coverage(self, dimension: str) -> dict[str, Any]:
        names = list(self._hierarchy[dimension])
        written = {name: self._written[dimension, name] for name in names}
        of_all: Counter[str] = Counter()
        for name in names:
            of_all.update(self._preferences.get((dimension, name), Counter()))
        total = sum(written.values())
        return {
            "sets": total,
            "subdimensions": {
                name: {
                    "drawn": self._drawn[dimension, name],
                    "written": written[name],
                    "share": written[name] / total if total else None,
                    "distinct_preferences": len(self._preferences.get((dimension, name), ())),
                }
                for name in names
            },
            "distinct_subdimensions": sum(count > 0 for count in written.values()),
            "entropy_bits": _entropy(written.values()),
            "evenness": _evenness(written.values(), len(names)),
            "distinct_preferences": len(of_all),
            "preference_entropy_bits": _entropy(of_all.values()),
            "preference_evenness": _evenness(of_all.values(), len(of_all)),
            "most_frequent": [
                {"preference": self._wording[words], "times": times}
                for words, times in list(_sorted(of_all).items())[:MOST_FREQUENT]
            ],
        }


class _Words:
    """rouge-score's own tokens are ASCII's letters and digits; these are words in any script."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def similarity(messages: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How alike the messages of one instruction are (ROUGE-L's F1, 0 to 1), and how alike those of different ones.

    `messages`: of each instruction its written ones. Each pair of siblings has a pair of strangers beside it: the same
    first message, and the second's place in the next instruction that has so many. The strangers are the yardstick:
    how alike two messages by this model are that have nothing in common but the way they were made.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    families = [texts for texts in messages if len(texts) > 1]
    siblings: list[float] = []
    strangers: list[float] = []
    for place, texts in enumerate(families):
        others = [other for other in (*families[place + 1 :], *families[:place]) if len(other) == len(texts)]
        for first in range(len(texts)):
            for second in range(first + 1, len(texts)):
                siblings.append(scorer.score(texts[first], texts[second])["rougeL"].fmeasure)
                if others:
                    strangers.append(scorer.score(texts[first], others[0][second])["rougeL"].fmeasure)
    return {"instructions": len(families), "siblings": _spread(siblings), "strangers": _spread(strangers)}


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """How many, mean, median and the middle nine tenths, with the usual interpolation between two values."""
    if not len(values):
        return {"count": 0, "mean": None, "p5": None, "median": None, "p95": None}
    low, median, high = (float(value) for value in np.percentile(np.asarray(values, dtype=float), [5, 50, 95]))
    mean = math.fsum(values) / len(values)
    return {"count": len(values), "mean": mean, "p5": low, "median": median, "p95": high}


def _entropy(counts: Iterable[int]) -> float:
    """Shannon's, in bits."""
    found = [count for count in counts if count]
    total = sum(found)
    return math.fsum(-count / total * math.log2(count / total) for count in found) if len(found) > 1 else 0.0


def _evenness(counts: Iterable[int], kinds: int) -> float | None:
    """Entropy over the largest that so many kinds can have (Pielou's); None where there is but one kind."""
    return _entropy(counts) / math.log2(kinds) if kinds > 1 else None


def _shown(result: InstructionResult) -> dict[str, Any]:
    return {
        "source": result.instruction.place,
        "prompt": _beginning(result.instruction.prompt),
        "sets": [
            {
                "preferences": [
                    f"{preference.dimension} / {preference.subdimension}: {preference.preference}"
                    for preference in one.preferences
                ],
                "system": _beginning(one.system),
                "output": _beginning(one.output),
            }
            for one in result.written
        ],
    }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first, by name where they are equal; nothing that never happened."""
    return {name: count for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if count}


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
