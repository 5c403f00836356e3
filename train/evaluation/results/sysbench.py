"""SysBench: CSR, ISR and SSR, and the curves over the turns."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from train.evaluation.results.measures import Measure, Numbers, Record, Results, check_rows, iter_rows, read_interval
from train.reporting.conditions import Checksum


def read_sysbench(kind: str, path: Path, record: Record) -> Results:
    """Return CSR, ISR and SSR over all conversations and, as details, the curves over the turns.

    Rows of CSR and ISR are turns, those of SSR and of shares of conversations are conversations. Rows without a verdict
    are left out, as in the figures.
    """
    turns: dict[str, Record] = {}
    groups: dict[str, str] = {}
    holds: dict[str, list[bool | None]] = defaultdict(list)
    for line in iter_rows(path.with_name("sysbench_rows.jsonl")):
        conversation = str(line["system_id"])
        holds[conversation].append(line["holds"])
        if line["holds"] is not None:
            key = f"{conversation}, turn {line['turn']}"
            turns[key], groups[key] = line, conversation
    runs = {key: (*of_each, False).index(False) for key, of_each in holds.items() if None not in of_each}
    measures: dict[str, Measure] = {}

    def add(name: str, share: Record | None, rows: Numbers, **options: Any) -> None:
        if share is not None:
            measure = Measure(share["mean"], **read_interval(share, "groups"), rows=rows or None, **options)
            measures[name] = check_rows(measure, path)

    met: Numbers = {key: tuple(float(each["met"]) for each in line["criteria"]) for key, line in turns.items()}
    held: Numbers = {key: (float(line["holds"]),) for key, line in turns.items()}
    add("criteria met (CSR)", record["csr"], met, groups=groups)
    add("turns that hold (ISR)", record["isr"], held, groups=groups)
    add("turns held without a break (SSR)", record["ssr"], {key: (run / len(holds[key]),) for key, run in runs.items()})
    for number, share in enumerate(record["isr_by_turn"], 1):
        of_turn: Numbers = {key: numbers for key, numbers in held.items() if turns[key]["turn"] == number}
        add(f"turn {number} holds", share, of_turn, detail=True)
    for number, share in enumerate(record["holds_through"], 1):
        through: Numbers = {key: (float(run >= number),) for key, run in runs.items()}
        add(f"turns 1 to {number} hold", share, through, detail=True)
    judge = {f"judge {name}": value for name, value in record["judge"].items()}
    data = {
        "conversations": record["data"]["conversations"],
        "contents": Checksum(record["data"]["fingerprint"]),
    }
    conditions = {"data": data, "history": record["history"], **record["decoding"], **judge}
    missing = {f"turns without {what}": record["missing"][f"turns_without_{what}"] for what in ("answer", "verdict")}
    return Results(kind, path, record["model"], measures, conditions, record["respondent"] | missing)
