"""TensorTrust and RealGuardrails in hierarchy.json: shares by subset, and the score that weights subsets equally."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.results.measures import Measure, Numbers, Record, check_rows, read_interval
from train.reporting.conditions import Checksum

TITLES = {"tensortrust": "TensorTrust", "realguardrails": "RealGuardrails"}
_ALL = "all rows"


def read_published_sets(
    path: Path, record: Record, lines: Sequence[Record]
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, Any]]:
    """Return measures, conditions and notes of the published sets in a record. `lines`: those of hierarchy_rows.jsonl.

    Raises UserError if the lines belong to another run.
    """
    measures: dict[str, Measure] = {}
    conditions: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for name, title in TITLES.items():
        if name not in record:
            continue
        of_set = record[name]
        of_lines = [line for line in lines if line.get("set") == name]
        for scope, shares in of_set["shares"].items():
            chosen = [line for line in of_lines if scope == _ALL or not line["has_post_prompt"]]
            label = title if scope == _ALL else f"{title} {scope}"
            for subset, share in shares.items():
                numbers = _rows_of_score(chosen) if subset == "score" else _rows_of(chosen, subset)
                measure = Measure(
                    share["value"],
                    **read_interval(share, "groups"),
                    rows=numbers or None,
                    groups={line["key"]: str(line["group"]) for line in chosen},
                    detail=name == "tensortrust" and subset != "score",
                )
                measures[f"{label}: {subset}"] = check_rows(measure, path)
        rows = {"number": of_set["rows"], "contents": Checksum(of_set["fingerprint"])}
        conditions |= {f"{title} rows": rows, f"{title} decoding": of_set["decoding"]}
        if "judge" in of_set:
            conditions[f"{title} judge"] = of_set["judge"]
            notes[f"{title} judgements missing"] = sum(of_set["judgements"]["missing"].values())
        notes[f"{title} without an answer"] = of_set["endings"].get("no answer", 0)
    return measures, conditions, notes


def _rows_of(lines: Sequence[Mapping[str, Any]], subset: str) -> Numbers:
    """Return the verdicts on a subset."""
    return {
        line["key"]: (float(line["passed"]),)
        for line in lines
        if line["subset"] == subset and line["passed"] is not None
    }


def _rows_of_score(lines: Sequence[Mapping[str, Any]]) -> Numbers:
    """Return numbers whose mean is the mean of the subsets' shares; none if verdicts are missing.

    With missing verdicts the numbers of a row would depend on those of other rows, and a pair of equal verdicts would
    differ.
    """
    subsets = {line["subset"] for line in lines}
    by_subset = {subset: _rows_of(lines, subset) for subset in subsets}
    if sum(map(len, by_subset.values())) < len(lines):
        return {}
    return {
        key: (passed * len(lines) / (len(subsets) * len(rows)),)
        for rows in by_subset.values()
        for key, (passed,) in rows.items()
    }
