"""Writer of SYSGEN's rows, in the order of the sources.

    data/rows.jsonl, or data/rows-00000.parquet, ...    training rows: `path: OUTPUT_DIR/data` in a recipe
    left_out.jsonl                                      all other rows, each with the reason

A restarted run continues the same files (see train/datagen/dataset_writer.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow

from train.datagen.dataset_writer import LEFT_OUT, DatasetWriter
from train.sysgen.config import SysgenConfig
from train.sysgen.result import RowResult

DATA = "data"
OUTPUTS = (DATA, LEFT_OUT)

_TURN = pyarrow.struct(
    [
        (name, pyarrow.string())
        for name in ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content")
    ]
)
SCHEMA = pyarrow.schema([("messages", pyarrow.list_(_TURN)), ("tools", pyarrow.string()), ("sysgen", pyarrow.string())])
"""One schema for all rows: fields whose structure varies are JSON strings, which the trainer reads as well."""


class SysgenWriter(DatasetWriter):
    """Writer of row results."""

    def __init__(self, config: SysgenConfig) -> None:
        self._model, self._is_parquet = config.model, config.output.format == "parquet"
        super().__init__(Path(config.output_dir), config.output, {DATA: SCHEMA})

    def write_result(self, result: RowResult) -> None:
        """Write a row to the data set, or a dropped one to left_out.jsonl. Raises UserError."""
        if result.reason is not None:
            self.write(LEFT_OUT, [build_dropped_row(result, self._model)])
        else:
            rows = build_rows(result, self._model)
            self.write(DATA, map(_to_parquet, rows) if self._is_parquet else rows)


def build_rows(result: RowResult, model: str) -> list[dict[str, Any]]:
    """Return the training row, and its aligned twin if it has one.

    A row has `messages`, `tools` if there are any, and `sysgen`, which trainers ignore.
    """
    row: dict[str, Any] = {"messages": result.messages}
    if result.tools:
        row["tools"] = result.tools
    sysgen = {"source": result.place, "model": model, **_history(result), "answers": result.answers}
    rows = [row | {"sysgen": sysgen}]
    under_pressure = [pressure for pressure in result.pressure if pressure.is_kept]
    if under_pressure:
        rows = [
            {"messages": pressure.messages, "sysgen": sysgen | {"pressure": pressure.record()}}
            for pressure in under_pressure
        ]
    return rows


def build_dropped_row(result: RowResult, model: str) -> dict[str, Any]:
    """Return a row of left_out.jsonl."""
    source = {"source": result.place, "reason": result.reason, "detail": result.detail, "model": model}
    return source | _history(result)


def _history(result: RowResult) -> dict[str, Any]:
    """Return the fields on how the system message was made."""
    message = result.message
    return {
        "tags": list(message.tags),
        "annotated": message.render(),
        "written_by_model": result.written_by_model,
        "dropped": [{"tag": text.tag, "text": text.text, "reason": text.reason} for text in message.dropped],
        "repairs": dict(message.repairs),
        "verdicts": result.verdicts,
        "constraints": result.constraints,
        "reminded_of": list(result.reminded_of),
    }


def _to_parquet(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = [
        {**turn, "tool_calls": _json(turn["tool_calls"])} if turn.get("tool_calls") else turn
        for turn in row["messages"]
    ]
    return {
        "messages": turns,
        "tools": _json(row["tools"]) if row.get("tools") else None,
        "sysgen": _json(row["sysgen"]),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
