"""Statistics of a collection: counts, coverage of the hierarchy, similarity of messages, lengths.

Memory grows only with the number of different preferences and by eight bytes per length.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from train.datagen.stats import RunStats, SeededSample, sort_counts, truncate, unread_warning
from train.datagen.text_units import split_words
from train.multifaceted.collection.config import STAGES, CollectionConfig
from train.multifaceted.collection.hierarchy import DIMENSIONS, Hierarchy, normalize_words
from train.multifaceted.collection.prompts import PROMPT_VERSION
from train.multifaceted.collection.result import InstructionResult, SetResult, build_rows
from train.pressure.generated_counts import PressureCounts

SAMPLES = 5
COMPARED = 200
"""Instructions whose messages are compared: ROUGE-L takes about 20 ms per pair."""
MOST_FREQUENT = 10
LENGTHS = ("system", "prompt", "output")


class CollectionStats(RunStats):
    """Counts over the results of a collection. `written`: rows, one per written set."""

    def __init__(self, config: CollectionConfig, hierarchy: Hierarchy) -> None:
        super().__init__()
        self._config, self._hierarchy = config, hierarchy
        self.instructions = self.instructions_written = self.sets = self.pairs = 0
        self.set_drop_counts: Counter[str] = Counter()
        self._planned: Counter[tuple[str, str]] = Counter()
        """Sets by dimension and sub-dimension; likewise below."""
        self._written: Counter[tuple[str, str]] = Counter()
        self._preferences: dict[tuple[str, str], Counter[str]] = {}
        self._wording: dict[str, str] = {}
        """First wording of each normalized preference."""
        self._lengths = {name: array("l") for name in LENGTHS}
        """Of the rows in `data`: a kept row under pressure stands in for its set's, and its twin is a row too."""
        self.pressure = PressureCounts(config.seed) if config.pressure.is_on else None
        self._samples = SeededSample(SAMPLES, f"{config.seed} sample", digest_size=7)
        self._compared = SeededSample(COMPARED, f"{config.seed} compared", digest_size=7)

    def add(self, result: InstructionResult, pairs: int = 0) -> None:
        """Count one instruction and its number of pairs."""
        self.add_row(result)
        self.pairs += pairs
        if result.reason is not None:
            self.add_drop(self.drop_counts, result.reason, result.detail)
            return
        self.instructions += 1
        self.sets += len(result.sets)
        for preference_set in result.sets:
            if self.pressure is not None:
                place = f"{result.instruction.place}, set {preference_set.number}"
                self.pressure.add(preference_set.pressure, place, is_written=preference_set.reason is None)
            self._planned.update((planned.dimension, planned.subdimension) for planned in preference_set.planned)
            if preference_set.reason is not None:
                self.add_drop(self.set_drop_counts, preference_set.reason, preference_set.detail)
            else:
                self._add_written(preference_set)
        for row in build_rows(result):
            for name in LENGTHS:
                self._lengths[name].append(len(row[name]))
        written = result.written
        self.written += len(written)
        self.instructions_written += bool(written)
        if written:
            number = result.instruction.number or 0
            self._samples.add(number, lambda: _build_sample(result))
            self._compared.add(number, lambda: [preference_set.system for preference_set in written])

    def _add_written(self, written: SetResult) -> None:
        for preference in written.preferences:
            key = (preference.dimension, preference.subdimension)
            self._written[key] += 1
            words = normalize_words(preference.preference)
            self._preferences.setdefault(key, Counter())[words] += 1
            self._wording.setdefault(words, preference.preference)

    def drop_reasons(self) -> Counter[str]:
        """Return how often each reason dropped an instruction or a set."""
        return self.drop_counts + Counter({f"{reason} (sets)": count for reason, count in self.set_drop_counts.items()})

    def summary(self, time: str) -> list[str]:
        """Return the lines that the command prints at its end."""
        return [
            f"{self.written:,} rows and {self.pairs:,} pairs of {self.instructions:,} instructions "
            f"({self.rows:,} rows read) after {time}",
            *(self.pressure.summary() if self.pressure else ()),
            *self.format_drops("dropped instructions", self.drop_counts, self.rows),
            *self.format_drops("dropped sets", self.set_drop_counts, self.sets),
        ]

    def warnings(self) -> list[str]:
        """Return a line if most verdicts of the model's filter were unread."""
        return unread_warning(
            "filter.model",
            self.events["screen: neither yes nor no, and kept"],
            self.requests_of("screen"),
            "These instructions were kept. The replies are in answers.sqlite under the stage `screen`: check that the "
            "model replies with yes or no, and that screen.max_tokens leaves room for it.",
        )

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain values, for report.json."""
        return {
            "model": self._config.model,
            "prompt_version": PROMPT_VERSION,
            "rows": self.rows,
            "instructions": self.instructions,
            "instructions_written": self.instructions_written,
            "sets": self.sets,
            "sets_written": self.written,
            "rows_written": len(self._lengths["output"]),
            "pairs": self.pairs,
            "warnings": self.warnings(),
            "left_out": sort_counts(self.drop_counts),
            "sets_left_out": sort_counts(self.set_drop_counts),
            "unanswered": self.unanswered.counts(),
            "events": sort_counts(self.events),
            **({"pressure": self.pressure.facts()} if self.pressure else {}),
            "coverage": {dimension: self._coverage(dimension) for dimension in DIMENSIONS},
            "similarity": measure_similarity(self._compared.items()),
            "characters": {name: _describe(self._lengths[name]) for name in LENGTHS},
            "spent": self.usage_facts(STAGES),
            "samples": self._samples.items(),
        }

    def _coverage(self, dimension: str) -> dict[str, Any]:
        names = list(self._hierarchy[dimension])
        written = {name: self._written[dimension, name] for name in names}
        preferences: Counter[str] = Counter()
        for name in names:
            preferences.update(self._preferences.get((dimension, name), Counter()))
        total = sum(written.values())
        return {
            "sets": total,
            "subdimensions": {
                name: {
                    "drawn": self._planned[dimension, name],
                    "written": written[name],
                    "share": written[name] / total if total else None,
                    "distinct_preferences": len(self._preferences.get((dimension, name), ())),
                }
                for name in names
            },
            "distinct_subdimensions": sum(count > 0 for count in written.values()),
            "entropy_bits": _entropy(written.values()),
            "evenness": _evenness(written.values(), len(names)),
            "distinct_preferences": len(preferences),
            "preference_entropy_bits": _entropy(preferences.values()),
            "preference_evenness": _evenness(preferences.values(), len(preferences)),
            "most_frequent": [
                {"preference": self._wording[words], "times": count}
                for words, count in list(sort_counts(preferences).items())[:MOST_FREQUENT]
            ],
        }


class _WordTokenizer:
    """Tokenizer for rouge-score with words of any script; its own knows only ASCII letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def measure_similarity(messages: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Compare the messages of one instruction (siblings), and those of different instructions (strangers), by ROUGE-L.

    `messages`: the written messages of each instruction. Each pair of siblings has a pair of strangers: the same first
    message, and the message at the second's position in the next instruction with as many messages. Strangers are the
    yardstick: two messages by this model that share nothing but the way they were made.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    families = [texts for texts in messages if len(texts) > 1]
    siblings: list[float] = []
    strangers: list[float] = []
    for index, texts in enumerate(families):
        others = [other for other in (*families[index + 1 :], *families[:index]) if len(other) == len(texts)]
        for first in range(len(texts)):
            for second in range(first + 1, len(texts)):
                siblings.append(scorer.score(texts[first], texts[second])["rougeL"].fmeasure)
                if others:
                    strangers.append(scorer.score(texts[first], others[0][second])["rougeL"].fmeasure)
    return {"instructions": len(families), "siblings": _describe(siblings), "strangers": _describe(strangers)}


def _describe(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return count, mean, median, 5th and 95th percentile (linear interpolation)."""
    if not len(values):
        return {"count": 0, "mean": None, "p5": None, "median": None, "p95": None}
    low, median, high = (float(value) for value in np.percentile(np.asarray(values, dtype=float), [5, 50, 95]))
    mean = math.fsum(values) / len(values)
    return {"count": len(values), "mean": mean, "p5": low, "median": median, "p95": high}


def _entropy(counts: Iterable[int]) -> float:
    """Return the Shannon entropy in bits."""
    counts = [count for count in counts if count]
    total = sum(counts)
    return math.fsum(-count / total * math.log2(count / total) for count in counts) if len(counts) > 1 else 0.0


def _evenness(counts: Iterable[int], kinds: int) -> float | None:
    """Return Pielou's evenness, the entropy over its maximum for `kinds` kinds; None for a single kind."""
    return _entropy(counts) / math.log2(kinds) if kinds > 1 else None


def _build_sample(result: InstructionResult) -> dict[str, Any]:
    return {
        "source": result.instruction.place,
        "prompt": truncate(result.instruction.prompt),
        "sets": [
            {
                "preferences": [
                    f"{preference.dimension} / {preference.subdimension}: {preference.preference}"
                    for preference in written.preferences
                ],
                "system": truncate(written.system),
                "output": truncate(written.output),
            }
            for written in result.written
        ],
    }
