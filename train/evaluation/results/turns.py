"""Rules over several turns: shares that hold by turn, run lengths, answers and system gain, of each variant."""

from pathlib import Path
from typing import Any

from train.evaluation.results.measures import Measure, Record, Results, check_rows, iter_rows, read_interval
from train.formatting import format_count
from train.reporting.conditions import Checksum

_VARIANTS = {"plain": "plain", "push_back": "push-back"}
_KINDS = {"wording": ", held-out wordings", "rule": ", rules never trained"}
_UNANSWERED = ("no answer", "not asked")
_GAINS = ("gain", "accuracy", "gain_over_none", "accuracy_over_none")


def read_turns(kind: str, path: Path, record: Record) -> Results:
    """Return the measures of the last turn and of all turns; those of each turn, and of each kind, are details."""
    lines = list(iter_rows(path.with_name("turns_rows.jsonl")))
    turns = record["data"]["turns"]
    measures: dict[str, Measure] = {}
    for variant, label in _VARIANTS.items():
        if variant not in record:
            continue
        of_variant = [line for line in lines if line["variant"] == variant]
        for name, suffix in {"all": "", **_KINDS}.items():
            if name not in record[variant]:
                continue
            rows = [line for line in of_variant if name in ("all", line["held_out"])]
            of_kind = _of_kind(record[variant][name], rows, turns, is_detail=name != "all")
            measures |= {f"{label}{suffix}: {measure}": figure for measure, figure in of_kind.items()}
        if "gain" in record[variant]:
            gains = _gains(record[variant]["gain"], of_variant, turns)
            measures |= {f"{label}: {measure}": figure for measure, figure in gains.items()}
    data = record["data"]
    conversations = {
        "version": data["version"],
        "number": data["conversations"],
        "turns": turns,
        "push_back_at": data["push_back_at"],
        "seed": record["seed"],
        "contents": Checksum(data["fingerprint"]),
    }
    conditions = {"conversations": conversations, "history": record["history"]}
    unanswered = {
        f"{label} turns without an answer": sum(
            record[variant]["endings"].get(how, 0) for how in ("no answer", "not asked")
        )
        for variant, label in _VARIANTS.items()
        if variant in record
    }
    return Results(
        kind,
        path,
        record["model"],
        {name: check_rows(measure, path) for name, measure in measures.items()},
        conditions | record["decoding"],
        record["respondent"] | unanswered,
    )


def _of_kind(figures: Record, lines: list[Record], turns: int, *, is_detail: bool) -> dict[str, Measure]:
    measures = {}
    for turn in range(turns):
        detail = is_detail or turn < turns - 1
        through = f"all turns up to {turn + 1}" if detail else f"all {format_count(turns, 'turn')}"
        columns = {
            f"holds in turn {turn + 1}": ("held", [line["held"][turn] for line in lines]),
            f"holds in {through}": ("held_through", [all(line["held"][: turn + 1]) for line in lines]),
            f"question answered in turn {turn + 1}": ("answered", [line["answered"][turn] for line in lines]),
        }
        for name, (key, values) in columns.items():
            measures[name] = _measure(figures[key][turn], lines, values, detail=detail)
    runs = [line["run_length"] for line in lines]
    measures["turns held without a break (SSR)"] = _measure(
        figures["run_length"], lines, runs, unit="score", detail=is_detail
    )
    return measures


def _gains(figures: Record, lines: list[Record], turns: int) -> dict[str, Measure]:
    measures = {}
    for turn in range(turns):
        for number, name in enumerate(_GAINS):
            values = [line["gains"][turn][number] for line in lines]
            unit = "share" if name.startswith("accuracy") else "nats"
            detail = turn < turns - 1 or number > 0
            label = name.replace("_", " ").replace("gain", "system gain")
            measures[f"{label} in turn {turn + 1}"] = _measure(
                figures[name][turn], lines, values, unit=unit, detail=detail
            )
    return measures


def _measure(estimate: Record, lines: list[Record], values: list[Any], *, detail: bool, unit: str = "share") -> Measure:
    """Return a figure with the value of each conversation; conversations of one rule are a group."""
    rows = {line["conversation"]: (float(value),) for line, value in zip(lines, values, strict=True)}
    groups = {line["conversation"]: line["rule"] for line in lines}
    interval = read_interval(estimate, "groups")
    return Measure(estimate["mean"], **interval, unit=unit, rows=rows or None, groups=groups, detail=detail)
