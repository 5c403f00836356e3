"""Statistics of a SYSGEN run."""

from collections import Counter
from typing import Any

from train.datagen.stats import RunStats, SeededSample, sort_counts, truncate, unread_warning
from train.pressure.generated_counts import PressureCounts
from train.sysgen.config import SysgenConfig
from train.sysgen.prompts import PROMPT_VERSION
from train.sysgen.result import PHASES, RowResult
from train.sysgen.tags import TAGS

SAMPLES = 20
TURNS_SHOWN = 7
MOST_UNKNOWN_TAGS = 200
"""Names of invented tags that are counted; further names count as `others`."""
RATIO_BINS = tuple(round(2 ** (step / 4), 3) for step in range(-16, 17))
"""Edges of the histogram of answer lengths, new over original: 1/16 to 16, four bins per factor of two."""


class SysgenStats(RunStats):
    """Counts over the results of a SYSGEN run."""

    def __init__(self, config: SysgenConfig) -> None:
        super().__init__()
        self._config = config
        self.with_message = 0
        self.phases: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.dropped_texts: Counter[str] = Counter()
        self.unknown_tags: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.verdicts: dict[str, Counter[str]] = {tag: Counter() for tag in TAGS}
        self.removed: dict[str, Counter[str]] = {tag: Counter() for tag in TAGS}
        self.reminded: Counter[str] = Counter()
        self.reminded_with_tag: Counter[str] = Counter()
        self.constraints: Counter[str] = Counter()
        self.tags_judged = 0
        self.message_characters = self.original_characters = self.new_characters = self.answered_rows = 0
        self.sum_of_ratios = 0.0
        self.ratios = [0] * (len(RATIO_BINS) + 1)
        self.pressure = PressureCounts(config.seed) if config.pressure.is_on else None
        self._samples = SeededSample(SAMPLES, str(config.seed), digest_size=8)

    def add(self, result: RowResult) -> None:
        """Count one row."""
        self.add_row(result)
        self.phases.update(PHASES[: PHASES.index(result.phase) + 1])
        self._add_tags(result)
        if self.pressure is not None:
            self.pressure.add(result.pressure, result.place, is_written=result.reason is None)
        if result.reason is not None:
            self.add_drop(self.drop_counts, result.reason, result.detail)
            return
        self.written += 1
        if result.system:
            self.with_message += 1
            self.message_characters += len(result.system)
        self.tags.update(result.message.tags)
        self.reminded.update(result.reminded_of)
        self.reminded_with_tag.update(tag for tag in result.reminded_of if tag in result.message.tags)
        self.constraints.update(constraint["kind"] for constraint in result.constraints)
        if result.new_characters and result.original_characters:
            self.answered_rows += 1
            self.original_characters += result.original_characters
            self.new_characters += result.new_characters
            ratio = result.new_characters / result.original_characters
            self.sum_of_ratios += ratio
            self.ratios[sum(ratio >= edge for edge in RATIO_BINS)] += 1
        self._samples.add(result.index, lambda: _build_sample(result))

    def _add_tags(self, result: RowResult) -> None:
        """Count repairs, dropped texts and verdicts of a message."""
        self.tags_judged += result.tags_judged
        self.repairs.update(result.message.repairs)
        for dropped in result.message.dropped:
            if dropped.reason.startswith(("judged", "no verdict")):
                self.removed[dropped.tag][dropped.reason] += 1
                continue
            self.dropped_texts[dropped.reason] += 1
            if dropped.reason == "none of the eight tags":
                has_room = dropped.tag in self.unknown_tags or len(self.unknown_tags) < MOST_UNKNOWN_TAGS
                self.unknown_tags[dropped.tag if has_room else "others"] += 1
        for verdicts in result.verdicts:
            for tag in TAGS:
                self.verdicts[tag][verdicts.get(tag, "missing")] += 1

    def summary(self, time: str) -> list[str]:
        """Return the lines that the command prints at its end."""
        return [
            f"{self.written:,} of {self.rows:,} rows written after {time}",
            *(self.pressure.summary() if self.pressure else ()),
            *self.format_drops("dropped", self.drop_counts, self.rows),
        ]

    def warnings(self) -> list[str]:
        """Return a line for each stage most of whose verdicts were unread."""
        advice = (
            "The replies are in answers.sqlite under the stage `{0}`: check that the model writes the form that the "
            "prompt asks for, and that {0}.max_tokens leaves room for it."
        )
        missing = self._config.on_missing_verdict
        done = "kept without verification" if missing == "keep" else "dropped"
        return [
            *unread_warning(
                "verify",
                self.events["verdict that can't be read"],
                self.tags_judged,
                f"The phrases of these tags were {done} (on_missing_verdict: {missing}). {advice.format('verify')}",
            ),
            *unread_warning(
                "gates.judge",
                self.events["judgement that can't be read"],
                self.requests_of("judge"),
                f"These rows were kept without a judgement. {advice.format('judge')}",
            ),
        ]

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain values, for report.json."""
        phases = PHASES if self._config.message == "generate" else ("read", "answered")
        return {
            "model": self._config.model,
            "prompt_version": PROMPT_VERSION,
            "rows": self.rows,
            "rows_written": self.written,
            "rows_with_system_message": self.with_message,
            "rows_through_phase": {phase: self.phases[phase] for phase in phases},
            "warnings": self.warnings(),
            "left_out": sort_counts(self.drop_counts),
            "unanswered": self.unanswered.counts(),
            "events": sort_counts(self.events),
            "tags": {
                tag: {
                    "rows": self.tags[tag],
                    "share": self.tags[tag] / self.with_message if self.with_message else None,
                    "verdicts": {name: self.verdicts[tag][name] for name in ("Good", "Bad", "None", "missing")},
                    "phrases_removed": sort_counts(self.removed[tag]),
                    "reminded": self.reminded[tag],
                    "reminded_and_there": self.reminded_with_tag[tag],
                }
                for tag in TAGS
            },
            "repairs": sort_counts(self.repairs),
            "dropped": sort_counts(self.dropped_texts),
            "unknown_tags": sort_counts(self.unknown_tags),
            "constraints": sort_counts(self.constraints),
            **({"pressure": self.pressure.facts()} if self.pressure else {}),
            "characters": {
                "system_message_mean": self.message_characters / self.with_message if self.with_message else None,
                "rows_answered_anew": self.answered_rows,
                "original_answers": self.original_characters,
                "new_answers": self.new_characters,
                "ratio": self.new_characters / self.original_characters if self.original_characters else None,
                "mean_of_ratios": self.sum_of_ratios / self.answered_rows if self.answered_rows else None,
                "histogram_of_ratios": {"edges": list(RATIO_BINS), "rows": self.ratios},
            },
            "spent": self.usage_facts(sorted(self.usage)),
            "samples": self._samples.items(),
        }


def _build_sample(result: RowResult) -> dict[str, Any]:
    return {
        "source": result.place,
        "annotated": truncate(result.message.render() or result.system),
        "written_by_model": truncate(result.written_by_model),
        "conversation": [
            {"role": turn["role"], "content": truncate(turn["content"])} for turn in result.messages[:TURNS_SHOWN]
        ],
    }
