"""Figures of the built-in set: shares by setting, tactic, split and rule, and paired differences to the reference.

All are computed from the lines of hierarchy_rows.jsonl. Rows of one question are one group of the intervals
(train/resampling.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from train.evaluation.hierarchy.results_of_set import TablePart, share_record
from train.resampling import DIFFERENCE_BOUNDS, SHARE_BOUNDS, Bounds, Estimate, estimate_means

Line = Mapping[str, Any]

MEASURES = ("held", "answered", "both")
SPLITS = {"seen": "messages that may be trained", "wording": "held-out wordings", "rule": "rules never trained"}
"""Split -> its name in reports."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Shares:
    """Shares of some rows.

    - `measures`: `held`, `answered`, `both` and, where the messages hold a secret, `secret_kept`.
    - `refused`: number of refusals.
    - `secret_rows`: number of rows of `secret_kept`, those whose answer is not empty.
    - `differences`: measure -> difference to the reference rows of the same rule, message and question.
    """

    rows: int
    measures: Mapping[str, Estimate]
    refused: int
    secret_rows: int = 0
    differences: Mapping[str, Estimate] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the shares for JSON."""
        record: dict[str, Any] = {"rows": self.rows, "refused": self.refused}
        record |= {name: share_record(share) for name, share in self.measures.items()}
        if self.secret_rows:
            record["secret_kept"]["rows"] = self.secret_rows
        if self.differences:
            record["minus_reference"] = {name: estimate.record() for name, estimate in self.differences.items()}
        return record


def value(line: Line, measure: str) -> float:
    """Return 1 or 0: whether a line counts for a measure."""
    return float(line["held"] and line["answered"] if measure == "both" else line[measure])


def estimate_shares(lines: Sequence[Line], references: Mapping[str, Line], seed: int = 0) -> Shares:
    """Return the shares of `lines`. `references`: group -> its reference line; a line without one has no pair."""
    counted = dict.fromkeys(MEASURES, lines)
    with_secret = [line for line in lines if line["secret_kept"] is not None]
    if with_secret:
        counted["secret_kept"] = with_secret
    measures = {
        name: _estimate(
            [value(line, name) for line in of_measure],
            [line["question"] for line in of_measure],
            SHARE_BOUNDS,
            seed,
            permutations=0,
        )
        for name, of_measure in counted.items()
    }
    paired = [line for line in lines if line["group"] in references and line["setting"] != REFERENCE]
    differences = {}
    if paired:
        for name in MEASURES:
            values = [value(line, name) - value(references[line["group"]], name) for line in paired]
            differences[name] = _estimate(values, [line["question"] for line in paired], DIFFERENCE_BOUNDS, seed)
    return Shares(len(lines), measures, sum(line["refused"] for line in lines), len(with_secret), differences)


def by(lines: Sequence[Line], *names: str) -> dict[Any, list[Line]]:
    """Return the lines by the value of a key, or by the values of several."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        key = line[names[0]] if len(names) == 1 else tuple(line[name] for name in names)
        groups.setdefault(key, []).append(line)
    return groups


@dataclass(frozen=True)
class Figures:
    """All figures of the built-in set; settings, tactics, splits and rules are those of the lines.

    - `settings`: setting -> shares; `tactics`: (setting, tactic) -> shares.
    - `splits`: (split, setting) -> shares; `rules`: (rule, setting) -> shares.
    """

    settings: Mapping[str, Shares]
    tactics: Mapping[tuple[str, str], Shares]
    splits: Mapping[tuple[str, str], Shares]
    rules: Mapping[tuple[str, str], Shares]

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        settings = {
            setting: {
                **shares.record(),
                "by_tactic": {tactic: of.record() for (name, tactic), of in self.tactics.items() if name == setting},
            }
            for setting, shares in self.settings.items()
        }
        return {
            "settings": settings,
            "by_split": _nested(self.splits),
            "by_rule": _nested(self.rules),
        }

    def parts(self) -> list[TablePart]:
        """Return the lines of the table of settings."""
        parts = []
        for setting, shares in self.settings.items():
            columns = {name: shares.measures[name] for name in MEASURES}
            parts.append(TablePart(setting, shares.rows, **columns, difference=shares.differences.get("held")))
            if "secret_kept" in shares.measures:
                parts.append(TablePart(f"{setting}: secret kept", shares.secret_rows, shares.measures["secret_kept"]))
        return parts


def _nested(shares: Mapping[tuple[str, str], Shares]) -> dict[str, dict[str, Any]]:
    record: dict[str, dict[str, Any]] = {}
    for (first, second), of in shares.items():
        record.setdefault(first, {})[second] = of.record()
    return record


def compute_figures(lines: Sequence[Line], seed: int = 0) -> Figures:
    """Return all figures of the lines of the built-in set."""
    references = {line["group"]: line for line in lines if line["setting"] == REFERENCE}

    def shares_by(*names: str) -> dict[Any, Shares]:
        return {key: estimate_shares(of, references, seed) for key, of in by(lines, *names).items()}

    rules = {key: estimate_shares(of, {}, seed) for key, of in by(lines, "rule", "setting").items()}
    return Figures(shares_by("setting"), shares_by("setting", "tactic"), shares_by("split", "setting"), rules)


def _estimate(values: list[float], groups: list[str], bounds: Bounds, seed: int, **options: int) -> Estimate:
    _, numbers = np.unique(groups, return_inverse=True)
    column = np.array(values, np.float64)[:, None]
    return estimate_means(column, numbers.astype(np.int64), np.zeros(1), [bounds], seed=seed, **options)[0]
