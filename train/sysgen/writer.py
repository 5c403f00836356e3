"""The rows on disk, in the order of the sources, each with where it came from.

    data/rows.jsonl, or data/rows-00000.parquet, ...    what `train/sft.py` trains on: `path: OUTPUT_DIR/data`
    left_out.jsonl                                      every other row, with the reason

A run that goes on after a kill goes on in the same files (see `train/datagen/dataset_writer.py`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow

from train.datagen.config import OutputSection
from train.datagen.dataset_writer import JsonLines, open_rows
from train.errors import UserError
from train.storage.atomic_write import fsync
from train.sysgen.result import Outcome

_TURN = pyarrow.struct(
    [
        (name, pyarrow.string())
        for name in ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content")
    ]
)
_SCHEMA = pyarrow.schema(
    [("messages", pyarrow.list_(_TURN)), ("tools", pyarrow.string()), ("sysgen", pyarrow.string())]
)
"""One for all rows: what varies from row to row is JSON in a text, as the trainer reads it too."""


def written_row(outcome: Outcome, model: str) -> dict[str, Any]:
    """A row as it is written: `messages`, `tools` where it has any, and `sysgen`, which trainers ignore."""
    row: dict[str, Any] = {"messages": outcome.messages}
    if outcome.tools:
        row["tools"] = outcome.tools
    return row | {"sysgen": {"source": outcome.place, "model": model, **_history(outcome), "answers": outcome.answers}}


def row_left_out(outcome: Outcome, model: str) -> dict[str, Any]:
    """A row of left_out.jsonl."""
    why = {"source": outcome.place, "reason": outcome.reason, "detail": outcome.detail, "model": model}
    return why | _history(outcome)


def _history(outcome: Outcome) -> dict[str, Any]:
    """How the system message came to be what it is."""
    message = outcome.message
    return {
        "tags": list(message.tags),
        "annotated": message.render(),
        "written_by_model": outcome.written_by_model,
        "dropped": [{"tag": one.tag, "text": one.text, "reason": one.reason} for one in message.dropped],
        "repairs": dict(message.repairs),
        "verdicts": outcome.verdicts,
        "constraints": outcome.constraints,
        "reminded_of": list(outcome.reminded_of),
    }


def _for_parquet(row: Mapping[str, Any]) -> dict[str, Any]:
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


class Output:
    """Writes outcomes, in their order. Use it in a `with` block; call `finish` when there are no more."""

    def __init__(self, folder: Path, settings: OutputSection, model: str) -> None:
        self.model = model
        self._folder, self._format = folder / "data", settings.format
        try:
            self._rows = open_rows(self._folder, settings, _SCHEMA)
            self._left_out = JsonLines(folder / "left_out.jsonl")
        except OSError as error:
            raise UserError(f"output_dir: {folder} can't be written to: {error.strerror}.") from error

    def write(self, outcome: Outcome) -> None:
        """One more row. Raises UserError where the disk takes no more; what was written before is whole."""
        try:
            if outcome.reason is None:
                row = written_row(outcome, self.model)
                self._rows.write(_for_parquet(row) if self._format == "parquet" else row)
            else:
                self._left_out.write(row_left_out(outcome, self.model))
        except OSError as error:
            raise self._no_more(error) from error

    def finish(self) -> None:
        """There are no more rows. Raises UserError as `write` does."""
        try:
            self._rows.finish()
            self._left_out.finish()
            fsync(self._folder)
        except OSError as error:
            raise self._no_more(error) from error

    def _no_more(self, error: OSError) -> UserError:
        return UserError(
            f"output_dir: {self._folder} can't be written to: {error.strerror}. The answers are in the journal: "
            "make room, and start the same command again."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._rows.close()
        self._left_out.close()
