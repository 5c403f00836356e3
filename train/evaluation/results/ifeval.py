"""IFEval: shares of constraints and prompts, by turn and by rule."""

from collections import defaultdict
from pathlib import Path

from train.evaluation.results.measures import Measure, Numbers, Record, Results, check_rows, iter_rows, read_interval
from train.reporting.conditions import Checksum


def read_ifeval(kind: str, path: Path, record: Record) -> Results:
    """Return the shares of each turn, of each rule, and the gap between the turns."""
    by_manner: dict[tuple[str, str], Numbers] = defaultdict(dict)
    by_rule: dict[tuple[str, str], Numbers] = defaultdict(dict)
    for line in iter_rows(path.with_name("ifeval_answers.jsonl")):
        turn, key = line["turn"], str(line["key"])
        for manner in ("strict", "loose"):
            by_manner[turn, manner][key] = tuple(map(float, line[manner]))
        for rule, follows in zip(line["instruction_id_list"], line["strict"], strict=True):
            of_rule = by_rule[turn, rule]
            of_rule[key] = (*of_rule.get(key, ()), float(follows))
    turns = [turn for turn in ("system", "user") if turn in record]
    measures = {}
    for turn in turns:
        for manner in ("strict", "loose"):
            constraints = by_manner[turn, manner]
            prompts = {key: (min(numbers),) for key, numbers in constraints.items()}
            for name, rows in ((f"prompt_{manner}", prompts), (f"constraint_{manner}", constraints)):
                share = record[turn][name]
                measure = Measure(share["value"], **read_interval(share, "prompts"), rows=rows or None)
                measures[f"{turn}: {name.replace('_', 's, ')}"] = check_rows(measure, path)
        for rule, shares in record[turn]["by_rule"].items():
            share, rule_rows = shares["strict"], by_rule.get((turn, rule))
            measure = Measure(share["value"], **read_interval(share, "prompts"), rows=rule_rows, detail=True)
            measures[f"{turn}: {rule}"] = check_rows(measure, path)
    for name, label in (("prompt_strict", "prompts, strict"), ("constraint_strict", "constraints, strict")):
        if "gap" in record:
            gap = record["gap"][name]
            ours, theirs = measures[f"system: {label}"].rows or {}, measures[f"user: {label}"].rows or {}
            rows = {key: tuple(a - b for a, b in zip(ours[key], theirs[key], strict=True)) for key in ours}
            measure = Measure(gap["mean"], **read_interval(gap, "groups"), unit="points", rows=rows or None)
            measures[f"system less user: {label}"] = measure
    data = {
        "prompts": record["data"]["prompts"],
        "constraints": record["data"]["constraints"],
        "control": bool(record["data"]["control"]),
        "contents": Checksum(record["data"]["fingerprint"]),
    }
    conditions = {"data": data, **record["decoding"]}
    # An unanswered prompt counts as following nothing: a difference may come from the server.
    unanswered = {
        f"{label}, {turn} turn": record[turn]["endings"].get(how, 0)
        for label, how in (("without an answer", "no answer"), ("refused", "refused"))
        for turn in turns
    }
    notes = record["checkers"] | record["respondent"] | unanswered
    return Results(kind, path, record["model"], measures, conditions, notes)
