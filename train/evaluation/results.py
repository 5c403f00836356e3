"""Results of scripts/evaluate.py read back from a folder: each measure, with its rows if they were kept.

A kind of result is one entry of KINDS: its file, a test of its record, and a reader. A reader returns measures,
conditions (which must agree before two results are compared) and notes (which may differ and are then reported).
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from train.errors import UserError
from train.multifaceted.bench.pairwise import unfinished_in
from train.multifaceted.bench.protocol import noted_of, protocol_of
from train.reporting.conditions import UNKNOWN
from train.resampling import estimate_share, missing_interval_reason
from train.storage.local_paths import describe_missing_path

Record = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One figure.

    - `unit`: "share" (0 to 1), "points" (the difference of two shares), "nats" or "score".
    - `rows`: row -> its numbers, whose mean over all rows is `value`; None if they were not kept.
    - `groups`: row -> its group of the bootstrap; a row that is not listed is a group of its own.
    - `detail`: one of many, which a short table leaves out.
    - `missing`: the reason for a missing interval, if known (`train.resampling.missing_interval_reason`).
    - `parts`: row -> the line of the bench whose rubrics its score is the mean of.
    """

    value: float
    low: float | None
    high: float | None
    unit: str = "share"
    rows: Mapping[str, tuple[float, ...]] | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    detail: bool = False
    missing: str = ""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Results of one kind.

    - `model`: the model's name in the command; `folder`: its absolute path at that time, if known.
    - `incomplete`: missing parts of the figures, as a predicate: `is not finished: ...`.
    """

    kind: str
    path: Path
    model: str
    measures: Mapping[str, Measure]
    conditions: Mapping[str, Any]
    notes: Mapping[str, Any]
    folder: str | None = None
    incomplete: str = ""


def read_results(place: Path) -> dict[str, Results]:
    """Return kind -> results of a folder, or of one file. Raises UserError if there are none."""
    if place.is_dir():
        paths = [place / kind.file for kind in KINDS.values() if (place / kind.file).is_file()]
        if not paths:
            names = ", ".join(kind.file for kind in KINDS.values())
            raise UserError(f"{place}: has no results (any of {names}). Measure the model first.")
    elif place.is_file():
        paths = [place]
    else:
        raise UserError(f"{place}: there is no such folder or file: {describe_missing_path(place)}")
    return {results.kind: results for results in map(_read, paths)}


def folder_of(model: str | Path) -> str | None:
    """Return the absolute path of a model's folder; None for a hub id."""
    return str(Path(model).resolve()) if Path(model).is_dir() else None


def read_before(later: Mapping[str, Results], place: Path) -> tuple[dict[str, Results], dict[str, str]]:
    """Return the results in `place`, with those that `later` holds of the same model (measured with `--before`).

    Also return kind -> folder of the kinds whose model before training is another one. Raises UserError if there are no
    results of the model in `place`.
    """
    before = {kind: earlier for kind, results in later.items() if (earlier := _read(results.path, before=True))}
    of_place = {kind: results for kind, results in before.items() if _place_of(results) == place.resolve()}
    others = {kind: str(_place_of(results)) for kind, results in before.items() if kind not in of_place}
    if of_place and not any((place / kind.file).is_file() for kind in KINDS.values()):
        return of_place, others
    try:
        return of_place | read_results(place), others
    except UserError as error:
        if not others:
            raise
        raise UserError(
            f"{str(error).rstrip('.')}. B was measured with --before {next(iter(others.values()))}, and A is "
            f"{place.resolve()}"
        ) from error


def _place_of(results: Results) -> Path:
    """Return the folder that a model had when it was measured or, if that is gone, its name relative to this folder."""
    if results.folder and Path(results.folder).is_dir():
        return Path(results.folder).resolve()
    return Path(results.model).resolve()


@overload
def _read(path: Path) -> Results: ...
@overload
def _read(path: Path, *, before: bool) -> Results | None: ...
def _read(path: Path, *, before: bool = False) -> Results | None:
    """Return the results in a file; with `before` those of the model before training, or None without one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in KINDS.items():
            if isinstance(record, dict) and kind.matches(record):
                if not before:
                    return kind.read(name, path, record)
                return kind.read_before(name, path, record) if kind.read_before else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: the file, or the rows beside it, cannot be read as results: {reason}") from error
    raise UserError(f"{path}: not a result of evaluate.py ({', '.join(KINDS)})")


def _lines(path: Path) -> Iterator[Record]:
    """Yield the lines of a file of rows; none if there is no such file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield json.loads(line)


def _interval(estimate: Mapping[str, Any], groups: str) -> dict[str, Any]:
    """Return low, high and `missing` of a Measure. `groups`: the key of the number of independent groups.

    Before intervals of equal values were Wilson's, they had no width: such an interval counts as missing.
    """
    low, high = estimate["low"], estimate["high"]
    if low is None or low == high:
        reason = missing_interval_reason(estimate.get("interval", ""), estimate.get(groups, 0))
        return {"low": None, "high": None, "missing": reason}
    return {"low": low, "high": high}


def _checked(measure: Measure, path: Path) -> Measure:
    """Return `measure`. Raises UserError if its rows do not have its mean, as another run has overwritten them."""
    numbers = [number for of_row in (measure.rows or {}).values() for number in of_row]
    if numbers and abs(sum(numbers) / len(numbers) - measure.value) > 1e-6:
        raise UserError(f"{path}: the rows beside it belong to another run. Measure this model again.")
    return measure


Numbers = dict[str, tuple[float, ...]]
"""Row -> its numbers."""


def _read_ifeval(kind: str, path: Path, record: Record) -> Results:
    by_manner: dict[tuple[str, str], Numbers] = defaultdict(dict)
    by_rule: dict[tuple[str, str], Numbers] = defaultdict(dict)
    for line in _lines(path.with_name("ifeval_answers.jsonl")):
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
                measure = Measure(share["value"], **_interval(share, "prompts"), rows=rows or None)
                measures[f"{turn}: {name.replace('_', 's, ')}"] = _checked(measure, path)
        for rule, shares in record[turn]["by_rule"].items():
            share, rule_rows = shares["strict"], by_rule.get((turn, rule))
            measure = Measure(share["value"], **_interval(share, "prompts"), rows=rule_rows, detail=True)
            measures[f"{turn}: {rule}"] = _checked(measure, path)
    for name, label in (("prompt_strict", "prompts, strict"), ("constraint_strict", "constraints, strict")):
        if "gap" in record:
            gap = record["gap"][name]
            ours, theirs = measures[f"system: {label}"].rows or {}, measures[f"user: {label}"].rows or {}
            rows = {key: tuple(a - b for a, b in zip(ours[key], theirs[key], strict=True)) for key in ours}
            measure = Measure(gap["mean"], **_interval(gap, "groups"), unit="points", rows=rows or None)
            measures[f"system less user: {label}"] = measure
    conditions = {"data": record["data"]["fingerprint"], **record["decoding"]}
    # An unanswered prompt counts as following nothing: a difference may come from the server.
    unanswered = {
        f"{label}, {turn} turn": record[turn]["endings"].get(how, 0)
        for label, how in (("without an answer", "no answer"), ("refused", "refused"))
        for turn in turns
    }
    notes = record["checkers"] | record["respondent"] | unanswered
    return Results(kind, path, record["model"], measures, conditions, notes)


def _read_harness(kind: str, path: Path, record: Record) -> Results:
    rows: dict[tuple[str, str], Numbers] = defaultdict(dict)
    documents: dict[str, list[str]] = defaultdict(list)
    for line in _lines(path.with_name("harness_rows.jsonl")):
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
            **_interval(score, "of"),
            unit="share" if is_mean and all(0 <= number <= 1 for number in numbers) else "score",
            rows=of_score if is_mean else None,
            detail=score["task"] in in_groups,
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


def _read_gain(kind: str, path: Path, record: Record) -> Results:
    name = "after" if "after" in record["models"] else next(iter(record["models"]))
    return _gain_of(name, kind, path, record)


def _read_gain_before(kind: str, path: Path, record: Record) -> Results | None:
    return _gain_of("before", kind, path, record) if "before" in record["models"] else None


def _gain_of(name: str, kind: str, path: Path, record: Record) -> Results:
    model = record["models"][name]
    lines = list(_lines(path.with_name(f"{path.stem}_rows.jsonl")))
    texts = record.get("fingerprint")
    # Equal texts come in the same order, whatever their places. Without a fingerprint only the places are known.
    keys = [str(number) if texts else line["place"] for number, line in enumerate(lines)]
    groups = {key: str(line["instruction"]) for key, line in zip(keys, lines, strict=True)}
    units = {"gain": "nats", "accuracy": "share", "gain_over_none": "nats", "accuracy_over_none": "share"}
    measures = {}
    for measure_name, unit in units.items():
        estimate = model["overall"][measure_name]
        rows = {key: (line[name][measure_name],) for key, line in zip(keys, lines, strict=True)}
        interval = _interval(estimate, "groups")
        measure = Measure(estimate["mean"], **interval, unit=unit, rows=rows or None, groups=groups)
        measures[measure_name.replace("_", " ")] = _checked(measure, path)
    options = record["options"]
    conditions = {"texts": texts, "rows": model["overall"]["rows"]}
    conditions |= {} if texts else {"data": [Path(data).name for data in record["data"]]}
    conditions |= {name: options[name] for name in ("others", "limit", "seed")}
    notes = {name: options.get(name) for name in ("template", "system_role", "dtype")}
    return Results(kind, path, model["model"], measures, conditions, notes, model.get("folder"))


def _read_rules(kind: str, path: Path, record: Record) -> Results:
    return _rules_of("after", str(path.parent), kind, path, record)


def _read_rules_before(kind: str, path: Path, record: Record) -> Results | None:
    model = record.get("asked", {}).get("before")
    return _rules_of("before", model, kind, path, record) if model else None


def _rules_of(side: str, model: str, kind: str, path: Path, record: Record) -> Results:
    rows: dict[str, Numbers] = defaultdict(dict)
    rows_of_rule: dict[tuple[str, str], Numbers] = defaultdict(dict)
    groups: dict[str, str] = {}
    times: Counter[tuple[str, ...]] = Counter()  # a duplicate row counts twice
    for line in _lines(path.with_name("answers.jsonl")):
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
        name = {"wording": "held-out wordings", "rule": "rules never trained"}.get(held_out, held_out)
        measures[name] = _checked(_share(value, rows[held_out], groups), path)
        for rule, of_one in of_rule.items():
            measure = _share(of_one[side] / of_one["rows"], rows_of_rule[held_out, rule], groups)
            measures[f"{name}: {rule}"] = replace(_checked(measure, path), detail=True)
    rows_by_rule = {
        held_out: {rule: of_one["rows"] for rule, of_one in of_rule.items()} for held_out, of_rule in counts.items()
    }
    conditions = {"rows by rule": rows_by_rule, "rows": sorted(key for of_kind in rows.values() for key in of_kind)}
    conditions["max_new_tokens"] = settings.get("max_new_tokens", UNKNOWN)
    folder = settings.get("before_folder") if side == "before" else None
    return Results(kind, path, model, measures, conditions, {"checks": settings.get("rules")}, folder)


def _share(value: float, rows: Mapping[str, tuple[float, ...]], groups: Mapping[str, str]) -> Measure:
    """Return a share with the interval over its rows, or without an interval if there are no rows."""
    if not rows:
        return Measure(value, None, None)
    estimate = estimate_share([number for (number,) in rows.values()], [groups[key] for key in rows])
    return Measure(value, estimate.low, estimate.high, rows=rows, groups=groups, missing=estimate.missing)


def _read_bench(kind: str, path: Path, record: Record) -> Results:
    lines = list(_lines(path.with_name("bench_rows.jsonl")))
    scored = {str(line["id"]): line for line in lines if line["score"] is not None}
    rows = {id: (float(line["score"]),) for id, line in scored.items()}
    incomplete = unfinished_in(lines)
    overall = record["score"]
    if overall["mean"] is None:
        reason = f"the run {incomplete}. Give the answers of the batch by --batch-in first" if incomplete else ""
        raise UserError(f"{path}: no row has a score, so there is nothing to compare: {reason or 'see report.md'}.")
    measure = Measure(overall["mean"], **_interval(overall, "rows"), unit="score", rows=rows or None, parts=scored)
    measures = {"score": _checked(measure, path)}
    for by in ("source", "dimension"):
        measures |= {
            f"{by}: {name}": Measure(score["mean"], **_interval(score, "rows"), unit="score", detail=True)
            for name, score in record[f"by_{by}"].items()
            if score["mean"] is not None
        }
    conditions = {"data": [Path(data).name for data in record["data"]], "rows": record["rows"]}
    conditions |= {"content of the rows": record.get("fingerprint", UNKNOWN)} | protocol_of(record)
    return Results(kind, path, record["model"], measures, conditions, noted_of(record), incomplete=incomplete)


@dataclass(frozen=True)
class _Kind:
    """A kind of result: its file, a test of its record, and its readers."""

    file: str
    matches: Callable[[Record], bool]
    read: Callable[[str, Path, Record], Results]
    read_before: Callable[[str, Path, Record], Results | None] | None = None


def _has_kind(kind: str) -> Callable[[Record], bool]:
    return lambda record: record.get("kind") == kind


KINDS = {
    "gain": _Kind(
        "gain.json", lambda record: "models" in record and "left_out" in record, _read_gain, _read_gain_before
    ),
    "rules": _Kind(
        "adherence.json", lambda record: bool({"wording", "rule"} & set(record)), _read_rules, _read_rules_before
    ),
    "ifeval": _Kind("ifeval.json", _has_kind("ifeval"), _read_ifeval),
    "bench": _Kind("bench.json", lambda record: "judge" in record and "by_dimension" in record, _read_bench),
    "harness": _Kind("harness.json", _has_kind("harness"), _read_harness),
}
