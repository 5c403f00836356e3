"""Hierarchy: shares of each setting, tactic, split and rule, and the differences to the reference setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.results.measures import Measure, Record, Results, check_rows, iter_rows, read_interval
from train.evaluation.results.published_sets import read_published_sets
from train.pressure.tactics import SETTINGS
from train.reporting.conditions import Checksum

_MEASURES = {"held": "held", "answered": "answered", "both": "held and answered", "secret_kept": "secret kept"}
_SPLITS = {"seen": "trained messages", "wording": "held-out wordings", "rule": "rules never trained"}


def read_hierarchy(kind: str, path: Path, record: Record) -> Results:
    """Return the measures of the built-in set and of the published sets, paired by row."""
    every = list(iter_rows(path.with_name("hierarchy_rows.jsonl")))
    lines = [line for line in every if line["set"] == "pressure"]
    measures = {name: check_rows(measure, path) for name, measure in _measures(record["pressure"], lines)}
    data = record["pressure"]["data"]
    rows = {"version": data["version"], "split": record["split"]}
    rows |= {setting: data["by_setting"].get(setting, 0) for setting in SETTINGS}
    conditions = {"rows": rows | {"contents": Checksum(data["fingerprint"])}, **record["decoding"]}
    notes = record["respondent"] | {
        "tool results": data["tool_results"]["in"],
        "without an answer": data["endings"].get("no answer", 0),
    }
    published, conditions_of_published, notes_of_published = read_published_sets(path, record, every)
    return Results(
        kind,
        path,
        record["model"],
        measures | published,
        conditions | conditions_of_published,
        notes | notes_of_published,
    )


def _measures(figures: Record, lines: Sequence[Record]) -> list[tuple[str, Measure]]:
    measures = []
    for setting, shares in figures["settings"].items():
        of_setting = [line for line in lines if line["setting"] == setting]
        for name, label in _MEASURES.items():
            if name in shares:
                measures.append((f"{setting}: {label}", _share(shares[name], name, of_setting)))
        for name, difference in shares.get("minus_reference", {}).items():
            label = f"{setting} minus reference: {_MEASURES[name]}"
            measures.append((label, _difference(difference, name, of_setting, lines)))
        for tactic, of_tactic in shares["by_tactic"].items():
            selected = [line for line in of_setting if line["tactic"] == tactic]
            measures += _details(f"{setting}, {tactic}", of_tactic, selected)
    for split, by_setting in figures["by_split"].items():
        for setting, shares in by_setting.items():
            selected = [line for line in lines if (line["split"], line["setting"]) == (split, setting)]
            measures += _details(f"{setting}, {_SPLITS[split]}", shares, selected)
    for rule, by_setting in figures["by_rule"].items():
        for setting, shares in by_setting.items():
            selected = [line for line in lines if (line["rule"], line["setting"]) == (rule, setting)]
            measures += _details(f"{setting}, {rule}", shares, selected)
    return measures


def _details(name: str, shares: Record, lines: Sequence[Record]) -> list[tuple[str, Measure]]:
    return [
        (f"{name}: {_MEASURES[measure]}", _share(shares[measure], measure, lines, detail=True))
        for measure in ("held", "both")
    ]


def _share(share: Mapping[str, Any], name: str, lines: Sequence[Record], *, detail: bool = False) -> Measure:
    counted = [line for line in lines if name == "both" or line[name] is not None]
    rows = {line["key"]: (_value(line, name),) for line in counted}
    groups = {line["key"]: line["question"] for line in counted}
    interval = read_interval(share, "groups")
    return Measure(share["value"], **interval, rows=rows or None, groups=groups, detail=detail)


def _difference(
    difference: Mapping[str, Any], name: str, lines: Sequence[Record], all_lines: Sequence[Record]
) -> Measure:
    references = {line["group"]: _value(line, name) for line in all_lines if line["setting"] == "reference"}
    paired = [line for line in lines if line["group"] in references]
    rows = {line["key"]: (_value(line, name) - references[line["group"]],) for line in paired}
    groups = {line["key"]: line["question"] for line in paired}
    interval = read_interval(difference, "groups")
    return Measure(
        difference["mean"], **interval, unit="points", rows=rows or None, groups=groups, detail=name != "held"
    )


def _value(line: Record, name: str) -> float:
    return float(line["held"] and line["answered"] if name == "both" else line[name])
