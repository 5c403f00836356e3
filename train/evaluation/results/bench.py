"""Multifaceted Bench: the score, with the rubrics of each row."""

from pathlib import Path

from train.errors import UserError
from train.evaluation.results.measures import Measure, Record, Results, check_rows, iter_rows, read_interval
from train.multifaceted.bench.pairwise import unfinished_in
from train.multifaceted.bench.protocol import noted_of, protocol_of
from train.reporting.conditions import UNKNOWN, Checksum


def read_bench(kind: str, path: Path, record: Record) -> Results:
    """Return the score, and that of each source and dimension. Raises UserError if no row has a score."""
    lines = list(iter_rows(path.with_name("bench_rows.jsonl")))
    scored = {str(line["id"]): line for line in lines if line["score"] is not None}
    rows = {id: (float(line["score"]),) for id, line in scored.items()}
    incomplete = unfinished_in(lines)
    overall = record["score"]
    if overall["mean"] is None:
        reason = f"the run {incomplete}. Give the answers of the batch by --batch-in first" if incomplete else ""
        raise UserError(f"{path}: no row has a score, so there is nothing to compare: {reason or 'see report.md'}.")
    measure = Measure(overall["mean"], **read_interval(overall, "rows"), unit="score", rows=rows or None, parts=scored)
    measures = {"score": check_rows(measure, path)}
    for by in ("source", "dimension"):
        measures |= {
            f"{by}: {name}": Measure(score["mean"], **read_interval(score, "rows"), unit="score", detail=True)
            for name, score in record[f"by_{by}"].items()
            if score["mean"] is not None
        }
    conditions = {"data": [Path(data).name for data in record["data"]], "rows": record["rows"]}
    contents = Checksum(record.get("fingerprint", UNKNOWN))
    conditions |= {"contents of the rows": contents} | protocol_of(record)
    return Results(kind, path, record["model"], measures, conditions, noted_of(record), incomplete=incomplete)
