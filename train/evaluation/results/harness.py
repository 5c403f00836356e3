"""Lm-evaluation-harness: scores of its tasks and groups."""

import hashlib
from collections import defaultdict
from pathlib import Path

from train.evaluation.results.measures import Measure, Numbers, Record, Results, iter_rows, read_interval


def read_harness(kind: str, path: Path, record: Record) -> Results:
    """Return the metrics of all tasks and groups."""
    rows: dict[tuple[str, str], Numbers] = defaultdict(dict)
    documents: dict[str, list[str]] = defaultdict(list)
    for line in iter_rows(path.with_name("harness_rows.jsonl")):
        key = f"{line['task']}:{line['document']}:{line['hash']}"
        documents[line["task"]].append(key)
        for name, score in line["scores"].items():
            metric = name if line["filter"] == "none" else f"{name} ({line['filter']})"
            rows[line["task"], metric][key] = tuple(map(float, score if isinstance(score, list) else [score]))
    in_groups = {leaf for score in record["scores"] if len(score["leaves"]) > 1 for leaf in score["leaves"]}
    measures = {}
    for score in record["scores"]:
        of_score = {key: row for leaf in score["leaves"] for key, row in rows[leaf, score["metric"]].items()}
        numbers = [number for row in of_score.values() for number in row]
        # Not every metric is the mean of its rows (a perplexity, a group that gives its tasks equal weights).
        is_mean = bool(numbers) and abs(sum(numbers) / len(numbers) - score["value"]) < 1e-6
        measures[f"{score['task']}: {score['metric']}"] = Measure(
            score["value"],
            **read_interval(score, "of"),
            unit="share" if is_mean and all(0 <= number <= 1 for number in numbers) else "score",
            rows=of_score if is_mean else None,
            # BBQ has two bias scores over all documents, and two of each of its eleven categories.
            detail=score["task"] in in_groups or "_bias_score_" in score["metric"],
            lower_is_better=score.get("better") == "lower",  # files of older versions do not say
        )
    options = record["options"]
    keys = sorted(key for of_task in documents.values() for key in set(of_task))
    conditions = {
        "documents": hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest(),
        "few-shot examples": {score["task"]: score["few_shot"] for score in record["scores"]},
        "versions of the tasks": {score["task"]: score["version"] for score in record["scores"]},
    }
    notes = {name: options.get(name) for name in ("system_instruction", "template", "system_role", "dtype")}
    notes["lm_eval"] = record["lm_eval"]
    return Results(kind, path, record["model"], measures, conditions, notes)
