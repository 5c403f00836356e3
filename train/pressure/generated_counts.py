"""Counts of the rows under pressure in generated data, for report.json and report.md."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from train.datagen.config import PRESSURE_SETTINGS
from train.datagen.stats import SeededSample, sort_counts, truncate
from train.pressure.generated import PressureRow
from train.reporting.markdown import code_block, count_section, format_share, format_table

SAMPLES = 5
NOT_WRITTEN = "the row was dropped"


class PressureCounts:
    """Counts by setting. `seed`: of the sample of conversations."""

    def __init__(self, seed: int) -> None:
        self.rows: Counter[str] = Counter()
        """Rows that were to be in a setting; under `aligned`, twins of kept conflict rows."""
        self.kept: Counter[str] = Counter()
        self.tactics: dict[str, Counter[str]] = {}
        """Kept rows by tactic; likewise below."""
        self.given_up: dict[str, Counter[str]] = {}
        self.refused_answers: dict[str, Counter[str]] = {}
        self.constraints: Counter[str] = Counter()
        self._samples = SeededSample(SAMPLES, f"{seed} pressure", digest_size=7)

    def add(self, rows: Sequence[PressureRow], place: str, *, is_written: bool = True) -> None:
        """Count the pressure rows of one row. `is_written`: False if the pipeline dropped the row afterwards."""
        for row in rows:
            setting = row.setting
            self.rows[setting] += 1
            self.refused_answers.setdefault(setting, Counter()).update(row.refused_answers)
            if not (row.is_kept and is_written):
                self.given_up.setdefault(setting, Counter())[row.reason or NOT_WRITTEN] += 1
                continue
            self.kept[setting] += 1
            self.tactics.setdefault(setting, Counter())[row.tactic] += 1
            if row.constraint is not None:
                self.constraints[row.constraint.kind] += 1
            sample = {"source": place, **row.record(), "conversation": _shorten(row.messages)}
            self._samples.add(self.rows.total(), partial(dict, sample))

    def summary(self) -> list[str]:
        """Return the line that a command prints at its end; none if no row was drawn."""
        settings = [setting for setting in PRESSURE_SETTINGS if self.rows[setting]]
        counts = [f"{setting} {self.kept[setting]:,} of {self.rows[setting]:,}" for setting in settings]
        twins = f"; {self.kept['aligned']:,} aligned twins beside them" if self.rows["aligned"] else ""
        return [f"under pressure: {', '.join(counts)}{twins}"] if counts else []

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {
            "settings": {
                setting: {
                    "rows": self.rows[setting],
                    "kept": self.kept[setting],
                    "tactics": sort_counts(self.tactics.get(setting, {})),
                    "given_up": sort_counts(self.given_up.get(setting, {})),
                    "refused_answers": sort_counts(self.refused_answers.get(setting, {})),
                }
                for setting in (*PRESSURE_SETTINGS, "aligned")
                if self.rows[setting]
            },
            "constraints": sort_counts(self.constraints),
            "samples": self._samples.items(),
        }


def pressure_section(facts: Mapping[str, Any] | None) -> Iterable[str]:
    """Yield the section of report.md; nothing for a run without pressure."""
    if facts is None:
        return
    settings = facts["settings"]
    yield "## Rows under pressure"
    yield (
        "`rows`: drawn for the setting; `aligned`: twins of kept conflict rows, which are extra rows. A row that was "
        "given up is written without pressure, a twin is left out. An answer is refused if a program sees that it "
        "breaks the message or does not answer the question."
    )
    yield format_table(
        ("setting", "rows", "kept", "share", "refused answers"),
        [
            (
                setting,
                f"{of['rows']:,}",
                f"{of['kept']:,}",
                format_share(of["kept"], of["rows"]),
                f"{sum(of['refused_answers'].values()):,}",
            )
            for setting, of in settings.items()
        ],
    )
    for key, title, cell in (
        ("tactics", "Kept, by tactic", "tactic"),
        ("given_up", "Given up", "reason"),
        ("refused_answers", "Refused answers", "reason"),
    ):
        counts = {f"{setting}: {name}": count for setting, of in settings.items() for name, count in of[key].items()}
        yield from count_section(title, f"setting: {cell}", counts)
    for sample in facts["samples"]:
        yield f"### {sample['source']}: {sample['setting']}, {sample['tactic']}"
        yield from (f"**{turn['role']}**\n\n{code_block(turn['content'])}" for turn in sample["conversation"])


def _shorten(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": truncate(turn["content"])} for turn in messages]
