"""What the commands of scripts/evaluate.py left in a folder, read back: each measure with its rows, where they stand.

A kind of result is one entry of KINDS: its file, by what its record is known, and a function that reads it. A reader
gives measures, the conditions that must agree for two to be compared, and those that may differ and are only named.
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
    """One figure. `rows`: row -> its numbers, whose mean over all rows is `value`; None where they aren't kept.

    `unit`: "share" (0 to 1), "points" (the difference of two shares), "nats" or "score". `groups`: row -> what is drawn
    again as a whole; the row itself where it isn't named. `detail`: one of many, which a short table leaves out.
    """

    value: float
    low: float | None
    high: float | None
    unit: str = "share"
    rows: Mapping[str, tuple[float, ...]] | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    detail: bool = False
    missing: str = ""
    """Return the reason for a missing interval, where it is known (`train.resampling.missing_interval_reason`)."""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """row -> the line of the bench whose rubrics its score is the mean of."""


@dataclass(frozen=True)
class Results:
    """Results of one kind. `model`: what was measured, as it was named; `folder`: where that was, if it is known."""

    kind: str
    path: Path
    model: str
    measures: Mapping[str, Measure]
    conditions: Mapping[str, Any]
    notes: Mapping[str, Any]
    folder: str | None = None
    incomplete: str = ""
    """Missing parts of the figures, as a predicate: `is not finished: ...`."""


def read_results(place: Path) -> dict[str, Results]:
    """kind -> results, of a folder with any of them or of one file. Raises UserError."""
    if place.is_dir():
        paths = [place / kind.file for kind in KINDS.values() if (place / kind.file).is_file()]
        if not paths:
            names = ", ".join(kind.file for kind in KINDS.values())
            raise UserError(f"{place}: there are no results in it (any of {names}); measure the model first")
    elif place.is_file():
        paths = [place]
    else:
        raise UserError(f"{place}: there is no such folder or file: {describe_missing_path(place)}")
    found = [_read(path) for path in paths]
    return {results.kind: results for results in found}


def folder_of(model: str | Path) -> str | None:
    """Where the folder of a model is, whatever folder a command runs in; None of a hub id."""
    return str(Path(model).resolve()) if Path(model).is_dir() else None


def read_before(later: Mapping[str, Results], place: Path) -> tuple[dict[str, Results], dict[str, str]]:
    """What stands in `place`, and what `later` holds of the model there, which it was measured against (`--before`).

    And of which kinds `later` holds a model before that is another: kind -> where that is. Raises UserError where there
    is nothing of the model in `place`.
    """
    before = {kind: found for kind, one in later.items() if (found := _read(one.path, before=True))}
    known = {kind: one for kind, one in before.items() if _place_of(one) == place.resolve()}
    others = {kind: str(_place_of(one)) for kind, one in before.items() if kind not in known}
    if known and not any((place / kind.file).is_file() for kind in KINDS.values()):
        return known, others
    try:
        return known | read_results(place), others
    except UserError as fault:
        if not others:
            raise
        raise UserError(
            f"{fault}. B was measured with --before {next(iter(others.values()))}, and A is {place.resolve()}"
        ) from fault


def _place_of(one: Results) -> Path:
    """Where a model was as it was measured; where that is no more, what its name says from here."""
    if one.folder and Path(one.folder).is_dir():
        return Path(one.folder).resolve()
    return Path(one.model).resolve()


@overload
def _read(path: Path) -> Results: ...
@overload
def _read(path: Path, *, before: bool) -> Results | None: ...
def _read(path: Path, *, before: bool = False) -> Results | None:
    """The results in a file; with `before` those of the model that it was compared with there, if there was one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in KINDS.items():
            if isinstance(record, dict) and kind.is_one(record):
                if not before:
                    return kind.read(name, path, record)
                return kind.read_before(name, path, record) if kind.read_before else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as fault:
        what = getattr(fault, "strerror", None) or f"{type(fault).__name__}: {fault}"
        raise UserError(f"{path}: it and what stands beside it can't be read as results: {what}") from fault
    raise UserError(f"{path}: that is no result of evaluate.py ({', '.join(KINDS)})")


def _lines(path: Path) -> Iterator[Record]:
    """The lines of a file of rows; none where there is no such file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield json.loads(line)


def _interval(given: Mapping[str, Any], groups: str) -> dict[str, Any]:
    """Low, high and `missing` of a Measure, of a record that says under the key `groups` how many are independent.

    Before intervals of equal values were Wilson's, they had no width, and stand for none.
    """
    if given["low"] is None or given["low"] == given["high"]:
        return {
            "low": None,
            "high": None,
            "missing": missing_interval_reason(given.get("interval", ""), given.get(groups, 0)),
        }
    return {"low": given["low"], "high": given["high"]}


def _of_these(measure: Measure, path: Path) -> Measure:
    """`measure`, whose rows must be those of the figure. Raises UserError where another run has written over them."""
    numbers = [number for of_row in (measure.rows or {}).values() for number in of_row]
    if numbers and abs(sum(numbers) / len(numbers) - measure.value) > 1e-6:
        raise UserError(f"{path}: the rows beside it are of another run; measure this model again")
    return measure


def _read_ifeval(kind: str, path: Path, record: Record) -> Results:
    strict: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    loose: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    of_rules: dict[str, dict[str, dict[str, tuple[float, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for line in _lines(path.with_name("ifeval_answers.jsonl")):
        strict[line["turn"]][str(line["key"])] = tuple(map(float, line["strict"]))
        loose[line["turn"]][str(line["key"])] = tuple(map(float, line["loose"]))
        for rule, follows in zip(line["instruction_id_list"], line["strict"], strict=True):
            of_rule = of_rules[line["turn"]][rule]
            of_rule[str(line["key"])] = (*of_rule.get(str(line["key"]), ()), float(follows))
    measures = {}
    for turn in ("system", "user"):
        for manner, of_turn in (("strict", strict[turn]), ("loose", loose[turn])) if turn in record else ():
            kept: dict[str, dict[str, tuple[float, ...]]] = {
                f"prompt_{manner}": {key: (min(numbers),) for key, numbers in of_turn.items()},
                f"constraint_{manner}": of_turn,
            }
            for name, rows in kept.items():
                given = record[turn][name]
                measure = Measure(given["value"], **_interval(given, "prompts"), rows=rows or None)
                measures[f"{turn}: {name.replace('_', 's, ')}"] = _of_these(measure, path)
        for rule, given in record[turn]["by_rule"].items() if turn in record else ():
            one = given["strict"]
            kept_of_rule = of_rules[turn].get(rule)
            measure = Measure(one["value"], **_interval(one, "prompts"), rows=kept_of_rule, detail=True)
            measures[f"{turn}: {rule}"] = _of_these(measure, path)
    for name, of in (("prompt_strict", "prompts, strict"), ("constraint_strict", "constraints, strict")):
        if "gap" in record:
            gap = record["gap"][name]
            ours, theirs = measures[f"system: {of}"].rows or {}, measures[f"user: {of}"].rows or {}
            rows = {key: tuple(a - b for a, b in zip(ours[key], theirs[key], strict=True)) for key in ours}
            measure = Measure(gap["mean"], **_interval(gap, "groups"), unit="points", rows=rows or None)
            measures[f"system less user: {of}"] = measure
    conditions = {"data": record["data"]["fingerprint"], **record["decoding"]}
    # What got no answer counts as following nothing: a difference may be the server's.
    unanswered = {
        f"{words}, {turn} turn": record[turn]["endings"].get(how, 0)
        for words, how in (("without an answer", "no answer"), ("refused", "refused"))
        for turn in ("system", "user")
        if turn in record
    }
    notes = record["checkers"] | record["respondent"] | unanswered
    return Results(kind, path, record["model"], measures, conditions, notes)


def _read_harness(kind: str, path: Path, record: Record) -> Results:
    rows: dict[tuple[str, str], dict[str, tuple[float, ...]]] = defaultdict(dict)
    documents: dict[str, list[str]] = defaultdict(list)
    for line in _lines(path.with_name("harness_rows.jsonl")):
        key = f"{line['task']}:{line['document']}:{line['hash']}"
        documents[line["task"]].append(key)
        for name, score in line["scores"].items():
            metric = name if line["filter"] == "none" else f"{name} ({line['filter']})"
            rows[line["task"], metric][key] = tuple(map(float, score if isinstance(score, list) else [score]))
    within = {leaf for score in record["scores"] if len(score["leaves"]) > 1 for leaf in score["leaves"]}
    measures = {}
    for score in record["scores"]:
        kept = {key: one for leaf in score["leaves"] for key, one in rows[leaf, score["metric"]].items()}
        numbers = [number for one in kept.values() for number in one]
        # Not every metric is the mean of its rows (a perplexity, a group that weighs its tasks alike).
        is_mean = bool(numbers) and abs(sum(numbers) / len(numbers) - score["value"]) < 1e-6
        measures[f"{score['task']}: {score['metric']}"] = Measure(
            score["value"],
            **_interval(score, "of"),
            unit="share" if is_mean and all(0 <= number <= 1 for number in numbers) else "score",
            rows=kept if is_mean else None,
            detail=score["task"] in within,
        )
    options = record["options"]
    asked = sorted(key for of_task in documents.values() for key in set(of_task))
    conditions = {
        "documents": hashlib.blake2b("\n".join(asked).encode(), digest_size=16).hexdigest(),
        "few-shot examples": {score["task"]: score["few_shot"] for score in record["scores"]},
        "versions of the tasks": {score["task"]: score["version"] for score in record["scores"]},
    }
    notes = {name: options.get(name) for name in ("system_instruction", "template", "system_role", "dtype")}
    notes["lm_eval"] = record["lm_eval"]
    return Results(kind, path, record["model"], measures, conditions, notes)


def _read_gain(kind: str, path: Path, record: Record) -> Results:
    return _gain_of("after" if "after" in record["models"] else next(iter(record["models"])), kind, path, record)


def _read_gain_before(kind: str, path: Path, record: Record) -> Results | None:
    return _gain_of("before", kind, path, record) if "before" in record["models"] else None


def _gain_of(which: str, kind: str, path: Path, record: Record) -> Results:
    one = record["models"][which]
    lines = list(_lines(path.with_name(f"{path.stem}_rows.jsonl")))
    texts = record.get("fingerprint")
    # The same texts come in the same order, wherever they stand; without a fingerprint only the places are known.
    keys = [str(number) if texts else line["place"] for number, line in enumerate(lines)]
    groups = {key: str(line["instruction"]) for key, line in zip(keys, lines, strict=True)}
    units = {"gain": "nats", "accuracy": "share", "gain_over_none": "nats", "accuracy_over_none": "share"}
    measures = {}
    for name, unit in units.items():
        given = one["overall"][name]
        rows = {key: (line[which][name],) for key, line in zip(keys, lines, strict=True)}
        measure = Measure(given["mean"], **_interval(given, "groups"), unit=unit, rows=rows or None, groups=groups)
        measures[name.replace("_", " ")] = _of_these(measure, path)
    options = record["options"]
    conditions = {"texts": texts, "rows": one["overall"]["rows"]}
    conditions |= {} if texts else {"data": [Path(data).name for data in record["data"]]}
    conditions |= {name: options[name] for name in ("others", "limit", "seed")}
    notes = {name: options.get(name) for name in ("template", "system_role", "dtype")}
    return Results(kind, path, one["model"], measures, conditions, notes, one.get("folder"))


def _read_rules(kind: str, path: Path, record: Record) -> Results:
    return _rules_of("after", str(path.parent), kind, path, record)


def _read_rules_before(kind: str, path: Path, record: Record) -> Results | None:
    model = record.get("asked", {}).get("before")
    return _rules_of("before", model, kind, path, record) if model else None


def _rules_of(when: str, model: str, kind: str, path: Path, record: Record) -> Results:
    rows: dict[str, dict[str, tuple[float, ...]]] = defaultdict(dict)
    rows_of_rule: dict[tuple[str, str], dict[str, tuple[float, ...]]] = defaultdict(dict)
    groups: dict[str, str] = {}
    times: Counter[tuple[str, ...]] = Counter()  # a row may be there twice, and counts twice
    for line in _lines(path.with_name("answers.jsonl")):
        system, user = (message["content"] for message in line["messages"][:2])
        row = (line["held_out"], line["rule"], system, user)
        key = json.dumps([*row, times[row]])
        times[row] += 1
        obeys = (float(line["obeys"][("before", "after").index(when)]),)
        rows[line["held_out"]][key] = rows_of_rule[line["held_out"], line["rule"]][key] = obeys
        groups[key] = user
    how = record.get("asked", {})
    counted = {held_out: of_rule for held_out, of_rule in record.items() if held_out not in ("asked", "intervals")}
    measures = {}
    for held_out, of_rule in counted.items():
        count = sum(one["rows"] for one in of_rule.values())
        value = sum(one[when] for one in of_rule.values()) / count
        name = {"wording": "held-out wordings", "rule": "rules never trained"}.get(held_out, held_out)
        measures[name] = _of_these(_share(value, rows[held_out], groups), path)
        for rule, one in of_rule.items():
            measure = _share(one[when] / one["rows"], rows_of_rule[held_out, rule], groups)
            measures[f"{name}: {rule}"] = replace(_of_these(measure, path), detail=True)
    asked = {held_out: {rule: one["rows"] for rule, one in of_rule.items()} for held_out, of_rule in counted.items()}
    conditions = {"rows by rule": asked, "rows": sorted(key for of_kind in rows.values() for key in of_kind)}
    conditions["max_new_tokens"] = how.get("max_new_tokens", UNKNOWN)
    folder = how.get("before_folder") if when == "before" else None
    return Results(kind, path, model, measures, conditions, {"checks": how.get("rules")}, folder)


def _share(value: float, rows: Mapping[str, tuple[float, ...]], groups: Mapping[str, str]) -> Measure:
    """A share with the interval that its rows give it; without rows there is none."""
    if not rows:
        return Measure(value, None, None)
    found = estimate_share([number for (number,) in rows.values()], [groups[key] for key in rows])
    return Measure(value, found.low, found.high, rows=rows, groups=groups, missing=found.missing)


def _read_bench(kind: str, path: Path, record: Record) -> Results:
    lines = list(_lines(path.with_name("bench_rows.jsonl")))
    scored = {str(line["id"]): line for line in lines if line["score"] is not None}
    rows = {id: (float(line["score"]),) for id, line in scored.items()}
    incomplete = unfinished_in(lines)
    overall = record["score"]
    if overall["mean"] is None:
        why = f"the run {incomplete}. Give the answers of the batch by --batch-in first" if incomplete else ""
        raise UserError(f"{path}: no row has a score, so there is nothing to compare: {why or 'see report.md'}.")
    measure = Measure(overall["mean"], **_interval(overall, "rows"), unit="score", rows=rows or None, parts=scored)
    measures = {"score": _of_these(measure, path)}
    for by in ("source", "dimension"):
        measures |= {
            f"{by}: {name}": Measure(one["mean"], **_interval(one, "rows"), unit="score", detail=True)
            for name, one in record[f"by_{by}"].items()
            if one["mean"] is not None
        }
    conditions = {"data": [Path(data).name for data in record["data"]], "rows": record["rows"]}
    conditions |= {"content of the rows": record.get("fingerprint", UNKNOWN)} | protocol_of(record)
    return Results(kind, path, record["model"], measures, conditions, noted_of(record), incomplete=incomplete)


@dataclass(frozen=True)
class _Kind:
    file: str
    is_one: Callable[[Record], bool]
    read: Callable[[str, Path, Record], Results]
    read_before: Callable[[str, Path, Record], Results | None] | None = None


def _says(kind: str) -> Callable[[Record], bool]:
    return lambda record: record.get("kind") == kind


KINDS = {
    "gain": _Kind(
        "gain.json", lambda record: "models" in record and "left_out" in record, _read_gain, _read_gain_before
    ),
    "rules": _Kind(
        "adherence.json", lambda record: bool({"wording", "rule"} & set(record)), _read_rules, _read_rules_before
    ),
    "ifeval": _Kind("ifeval.json", _says("ifeval"), _read_ifeval),
    "bench": _Kind("bench.json", lambda record: "judge" in record and "by_dimension" in record, _read_bench),
    "harness": _Kind("harness.json", _says("harness"), _read_harness),
}
