"""Rules obeyed by the model after training, and by the one before it."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.evaluation.results.measures import Numbers, Record, Results, check_rows, iter_rows, share_measure
from train.reporting.conditions import UNKNOWN, Checksum

_KINDS = {"wording": "held-out wordings", "rule": "rules never trained"}


def read_rules(kind: str, path: Path, record: Record) -> Results:
    """Return the shares of the model after training."""
    return _rules_of("after", str(path.parent), kind, path, record)


def read_rules_before(kind: str, path: Path, record: Record) -> Results | None:
    """Return the shares of the model before training; None if the file does not name it."""
    model = record.get("asked", {}).get("before")
    return _rules_of("before", model, kind, path, record) if model else None


def _rules_of(side: str, model: str, kind: str, path: Path, record: Record) -> Results:
    rows: dict[str, Numbers] = defaultdict(dict)
    rows_of_rule: dict[tuple[str, str], Numbers] = defaultdict(dict)
    groups: dict[str, str] = {}
    times: Counter[tuple[str, ...]] = Counter()  # a duplicate row counts twice
    for line in iter_rows(path.with_name("answers.jsonl")):
        system, user = (message["content"] for message in line["messages"][:2])
        row = (line["held_out"], line["rule"], system, user)
        key = json.dumps([*row, times[row]])
        times[row] += 1
        obeys = (float(line["obeys"][("before", "after").index(side)]),)
        rows[line["held_out"]][key] = rows_of_rule[line["held_out"], line["rule"]][key] = obeys
        groups[key] = user
    settings = record.get("asked", {})
    counts = {held_out: of_rule for held_out, of_rule in record.items() if held_out not in ("asked", "intervals")}
    measures = {}
    for held_out, of_rule in counts.items():
        count = sum(of_one["rows"] for of_one in of_rule.values())
        value = sum(of_one[side] for of_one in of_rule.values()) / count
        name = _KINDS.get(held_out, held_out)
        measures[name] = check_rows(share_measure(value, rows[held_out], groups), path)
        for rule, of_one in of_rule.items():
            measure = share_measure(of_one[side] / of_one["rows"], rows_of_rule[held_out, rule], groups)
            measures[f"{name}: {rule}"] = replace(check_rows(measure, path), detail=True)
    of_rows: dict[str, Any] = {
        f"{rule} ({_KINDS.get(held_out, held_out)})": of_one["rows"]
        for held_out, of_rule in counts.items()
        for rule, of_one in of_rule.items()
    }
    of_rows["contents"] = Checksum(json.dumps(sorted(key for of_kind in rows.values() for key in of_kind)))
    conditions = {"rows": of_rows, "max_new_tokens": settings.get("max_new_tokens", UNKNOWN)}
    checks = settings.get("rules")
    folder = settings.get("before_folder") if side == "before" else None
    return Results(kind, path, model, measures, conditions, {"checks": checks and Checksum(checks)}, folder)
