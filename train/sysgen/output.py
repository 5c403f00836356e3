"""The rows on disk, in the order of the sources, each with where it came from.

    data/rows.jsonl, or data/rows-00000.parquet, ...    what `train/sft.py` trains on: `path: OUTPUT_DIR/data`
    left_out.jsonl                                      every other row, with the reason

A run that goes on after a kill makes the same rows again, out of the journal; what already stands in a file is compared
and left alone, so that the file only grows. From the first row that differs (another setting, other data) it is written
anew.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow
import pyarrow.parquet

from train.data.cache import sync
from train.errors import UserError
from train.sysgen.config import OutputSection
from train.sysgen.outcome import Outcome

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


class _Lines:
    """A file of JSON lines that keeps what it holds as long as the same lines are written again."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 16)
        self._is_same = True

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if self._is_same:
            start = self._file.tell()
            if self._file.read(len(line)) == line:
                return
            self._is_same = False
            self._file.seek(start)
            self._file.truncate()
        self._file.write(line)
        self._file.flush()  # whole lines, for whoever reads along

    def finish(self) -> None:
        """There are no more rows: what an earlier run wrote beyond these goes."""
        self._file.truncate(self._file.tell())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what a full disk didn't take is tried again here; `write` has told of it
            self._file.close()


class _ParquetFiles:
    """Files of so many rows, each written aside and renamed when it is whole."""

    def __init__(self, folder: Path, rows_per_file: int) -> None:
        self._folder, self._rows_per_file = folder, rows_per_file
        self._rows: list[dict[str, Any]] = []
        self._files = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append(_for_parquet(row))
        if len(self._rows) == self._rows_per_file:
            self._write_file()

    def finish(self) -> None:
        if self._rows or not self._files:
            self._write_file()
        for path in sorted(self._folder.glob("rows-?????.parquet"))[self._files :]:
            path.unlink()

    def close(self) -> None:
        self._rows = []

    def _write_file(self) -> None:
        path = self._folder / f"rows-{self._files:05d}.parquet"
        aside = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows, _SCHEMA), aside, compression="zstd")
        sync(aside)
        aside.rename(path)
        self._rows, self._files = [], self._files + 1


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
        self._folder = folder / "data"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._refuse_the_other_format(settings.format)
            rows: _Lines | _ParquetFiles
            if settings.format == "jsonl":
                rows = _Lines(self._folder / "rows.jsonl")
            else:
                rows = _ParquetFiles(self._folder, settings.rows_per_file)
            self._rows, self._left_out = rows, _Lines(folder / "left_out.jsonl")
        except OSError as error:
            raise UserError(f"output_dir: {folder} can't be written to: {error.strerror}.") from error

    def _refuse_the_other_format(self, format: str) -> None:
        other = sorted(self._folder.glob("rows-?????.parquet" if format == "jsonl" else "rows.jsonl"))
        if other:
            raise UserError(
                f"output_dir: {other[0]} is of an earlier run with another output.format, and both would be read as "
                "one data set. Move it away, or name another folder. The journal may stay: nothing is asked again."
            )

    def write(self, outcome: Outcome) -> None:
        """One more row. Raises UserError where the disk takes no more; what was written before is whole."""
        try:
            if outcome.reason is None:
                self._rows.write(written_row(outcome, self.model))
            else:
                self._left_out.write(row_left_out(outcome, self.model))
        except OSError as error:
            raise self._no_more(error) from error

    def finish(self) -> None:
        """There are no more rows. Raises UserError as `write` does."""
        try:
            self._rows.finish()
            self._left_out.finish()
            sync(self._folder)
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
