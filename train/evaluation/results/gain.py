"""System gain of the model after training, and of the one before it."""

from pathlib import Path

from train.evaluation.results.measures import Measure, Record, Results, check_rows, iter_rows, read_interval
from train.reporting.conditions import Checksum


def read_gain(kind: str, path: Path, record: Record) -> Results:
    """Return the gain of the model after training, or of the only one."""
    name = "after" if "after" in record["models"] else next(iter(record["models"]))
    return _gain_of(name, kind, path, record)


def read_gain_before(kind: str, path: Path, record: Record) -> Results | None:
    """Return the gain of the model before training; None without one."""
    return _gain_of("before", kind, path, record) if "before" in record["models"] else None


def _gain_of(name: str, kind: str, path: Path, record: Record) -> Results:
    model = record["models"][name]
    lines = list(iter_rows(path.with_name(f"{path.stem}_rows.jsonl")))
    texts = record.get("fingerprint")
    # Equal texts come in the same order, whatever their places. Without a fingerprint only the places are known.
    keys = [str(number) if texts else line["place"] for number, line in enumerate(lines)]
    groups = {key: str(line["instruction"]) for key, line in zip(keys, lines, strict=True)}
    units = {"gain": "nats", "accuracy": "share", "gain_over_none": "nats", "accuracy_over_none": "share"}
    measures = {}
    for measure_name, unit in units.items():
        estimate = model["overall"][measure_name]
        rows = {key: (line[name][measure_name],) for key, line in zip(keys, lines, strict=True)}
        interval = read_interval(estimate, "groups")
        measure = Measure(estimate["mean"], **interval, unit=unit, rows=rows or None, groups=groups)
        measures[measure_name.replace("_", " ")] = check_rows(measure, path)
    options = record["options"]
    conditions = {"texts": texts and Checksum(texts), "rows": model["overall"]["rows"]}
    conditions |= {} if texts else {"data": [Path(data).name for data in record["data"]]}
    conditions |= {name: options[name] for name in ("others", "limit", "seed")}
    notes = {name: options.get(name) for name in ("template", "system_role", "dtype")}
    return Results(kind, path, model["model"], measures, conditions, notes, model.get("folder"))
