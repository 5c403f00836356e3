"""What a run amounts to, in numbers: added up row by row, so that memory stays flat, and in no way by the clock.

The same outcomes give the same facts, whether they came in one start or in many.
"""

import hashlib
import heapq
from collections import Counter
from typing import Any

from train.datagen.drop_reasons import unread_warning
from train.datagen.usage import Usage
from train.llm.failures import NO_ANSWER, FailureReasons
from train.sysgen.config import SysgenConfig
from train.sysgen.prompts import PROMPT_VERSION
from train.sysgen.result import RowResult
from train.sysgen.tags import TAGS

PHASES = ("read", "generated", "filtered", "verified", "answered")
SAMPLES = 20
MOST_UNKNOWN_TAGS = 200
"""Names of tags that models invent; what is new beyond these counts as `others`."""
LONGEST_SHOWN = 1_500
RATIO_BINS = tuple(round(2 ** (step / 4), 3) for step in range(-16, 17))
"""Edges of the histogram of lengths, new over original: a sixteenth to sixteen times, four bins to a doubling."""


class SysgenStats:
    """Adds up outcomes."""

    def __init__(self, config: SysgenConfig) -> None:
        self._config = config
        self.rows = self.written = self.with_message = 0
        self.phases: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.unanswered = FailureReasons()
        self.events: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.unknown_tags: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.verdicts: dict[str, Counter[str]] = {tag: Counter() for tag in TAGS}
        self.removed: dict[str, Counter[str]] = {tag: Counter() for tag in TAGS}
        self.reminded: Counter[str] = Counter()
        self.took_reminder: Counter[str] = Counter()
        self.constraints: Counter[str] = Counter()
        self.tags_judged = 0
        self.message_characters = self.original_characters = self.new_characters = self.answered_rows = 0
        self.sum_of_ratios = 0.0
        self.ratios = [0] * (len(RATIO_BINS) + 1)
        self.spent: dict[str, Usage] = {}
        self._samples: list[tuple[int, int, dict[str, Any]]] = []

    def add(self, result: RowResult) -> None:
        """Count one row."""
        self.rows += 1
        for phase in PHASES[: PHASES.index(result.phase) + 1]:
            self.phases[phase] += 1
        self.events.update(result.events)
        for stage, spent in result.spent.items():
            self.spent.setdefault(stage, Usage()).add_all(spent)
        self._add_reading(result)
        if result.reason == NO_ANSWER:
            self.unanswered.add(result.detail)
        if result.reason is not None:
            self.left_out[result.reason] += 1
            return
        self.written += 1
        if result.system:
            self.with_message += 1
            self.message_characters += len(result.system)
        self.tags.update(result.message.tags)
        self.reminded.update(result.reminded_of)
        self.took_reminder.update(tag for tag in result.reminded_of if tag in result.message.tags)
        self.constraints.update(one["kind"] for one in result.constraints)
        if result.new_characters and result.original_characters:
            self.answered_rows += 1
            self.original_characters += result.original_characters
            self.new_characters += result.new_characters
            ratio = result.new_characters / result.original_characters
            self.sum_of_ratios += ratio
            self.ratios[sum(ratio >= edge for edge in RATIO_BINS)] += 1
        self._sample(result)

    def _add_reading(self, result: RowResult) -> None:
        """How the message was read, and what was taken out of it."""
        self.tags_judged += result.tags_judged
        self.repairs.update(result.message.repairs)
        for dropped in result.message.dropped:
            if dropped.reason.startswith(("judged", "no verdict")):
                self.removed[dropped.tag][dropped.reason] += 1
                continue
            self.dropped[dropped.reason] += 1
            if dropped.reason == "none of the eight tags":
                known = dropped.tag in self.unknown_tags or len(self.unknown_tags) < MOST_UNKNOWN_TAGS
                self.unknown_tags[dropped.tag if known else "others"] += 1
        for verdicts in result.verdicts:
            for tag in TAGS:
                self.verdicts[tag][verdicts.get(tag, "missing")] += 1

    def _sample(self, result: RowResult) -> None:
        """Keep the row if it is among the twenty that the seed gives the lowest numbers."""
        digest = hashlib.blake2b(f"{self._config.seed} {result.index}".encode(), digest_size=8).digest()
        rank = (-int.from_bytes(digest), result.index)
        if len(self._samples) == SAMPLES and rank < self._samples[0][:2]:
            return
        shown = {
            "source": result.place,
            "annotated": _beginning(result.message.render() or result.system),
            "written_by_model": _beginning(result.written_by_model),
            "conversation": [
                {"role": turn["role"], "content": _beginning(turn["content"])} for turn in result.messages[:7]
            ],
        }
        push = heapq.heappushpop if len(self._samples) == SAMPLES else heapq.heappush
        push(self._samples, (*rank, shown))

    def warnings(self) -> list[str]:
        """Return a line for each stage whose verdicts were mostly unread."""
        look = (
            "The replies are in answers.sqlite under the stage `{0}`: check that the model writes the form that the "
            "prompt asks for, and that {0}.max_tokens leaves room for it."
        )
        missing = self._config.on_missing_verdict
        done = "kept without verification" if missing == "keep" else "dropped"
        judged = self.spent["judge"].requests if "judge" in self.spent else 0
        return [
            *unread_warning(
                "verify",
                self.events["verdict that can't be read"],
                self.tags_judged,
                f"The phrases of these tags were {done} (on_missing_verdict: {missing}). {look.format('verify')}",
            ),
            *unread_warning(
                "gates.judge",
                self.events["judgement that can't be read"],
                judged,
                f"These rows were kept without a judgement. {look.format('judge')}",
            ),
        ]

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for report.json."""
        asked_for = PHASES if self._config.message == "generate" else ("read", "answered")
        return {
            "model": self._config.model,
            "prompt_version": PROMPT_VERSION,
            "rows": self.rows,
            "rows_written": self.written,
            "rows_with_system_message": self.with_message,
            "rows_through_phase": {phase: self.phases[phase] for phase in asked_for},
            "warnings": self.warnings(),
            "left_out": _sorted(self.left_out),
            "unanswered": self.unanswered.counts(),
            "events": _sorted(self.events),
            "tags": {
                tag: {
                    "rows": self.tags[tag],
                    "share": self.tags[tag] / self.with_message if self.with_message else None,
                    "verdicts": {name: self.verdicts[tag][name] for name in ("Good", "Bad", "None", "missing")},
                    "phrases_removed": _sorted(self.removed[tag]),
                    "reminded": self.reminded[tag],
                    "reminded_and_there": self.took_reminder[tag],
                }
                for tag in TAGS
            },
            "repairs": _sorted(self.repairs),
            "dropped": _sorted(self.dropped),
            "unknown_tags": _sorted(self.unknown_tags),
            "constraints": _sorted(self.constraints),
            "characters": {
                "system_message_mean": self.message_characters / self.with_message if self.with_message else None,
                "rows_answered_anew": self.answered_rows,
                "original_answers": self.original_characters,
                "new_answers": self.new_characters,
                "ratio": self.new_characters / self.original_characters if self.original_characters else None,
                "mean_of_ratios": self.sum_of_ratios / self.answered_rows if self.answered_rows else None,
                "histogram_of_ratios": {"edges": list(RATIO_BINS), "rows": self.ratios},
            },
            "spent": {
                stage: {
                    "requests": spent.requests,
                    "prompt_tokens": spent.prompt_tokens,
                    "completion_tokens": spent.completion_tokens,
                    "seconds": spent.seconds,
                }
                for stage, spent in sorted(self.spent.items())
            },
            "samples": [shown for _, _, shown in sorted(self._samples, key=lambda one: one[1])],
        }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first, by name where they are equal; nothing that never happened."""
    return {name: count for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if count}


def _beginning(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
