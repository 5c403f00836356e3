"""Files of rows that a run writes one after another, and a run that goes on after a kill writes again.

It makes the same rows, out of the journal of answers; what already stands in a file of lines is compared and left
alone, so that the file only grows. From the first row that differs it is written anew.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from train.datagen.config import OutputSection
from train.errors import UserError
from train.storage.atomic_write import fsync


class JsonLines:
    """A file of JSON lines that keeps what it holds as long as the same lines are written again."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 16)
        self._is_same = True

    def write(self, row: Mapping[str, Any]) -> None:
        """One more row."""
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
        """Leave it as it is."""
        with suppress(OSError):  # what a full disk didn't take is tried again here; `write` has told of it
            self._file.close()


class ParquetFiles:
    """Files of so many rows, each written aside and renamed when it is whole."""

    def __init__(self, folder: Path, rows_per_file: int, schema: pyarrow.Schema) -> None:
        self._folder, self._rows_per_file, self._schema = folder, rows_per_file, schema
        self._rows: list[dict[str, Any]] = []
        self._files = 0
        self._is_same = True

    def write(self, row: Mapping[str, Any]) -> None:
        """One more row; it is on the disk when its file is full."""
        self._rows.append(dict(row))
        if len(self._rows) == self._rows_per_file:
            self._write_file()

    def finish(self) -> None:
        """There are no more rows: the last file is written, and those beyond it go."""
        if self._rows or not self._files:
            self._write_file()
        for path in reversed(self._standing(self._files)):
            path.unlink()

    def close(self) -> None:
        """Forget the rows that fill no file yet."""
        self._rows = []

    def _write_file(self) -> None:
        path = self._folder / f"rows-{self._files:05d}.parquet"
        aside = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows, self._schema), aside, compression="zstd")
        fsync(aside)
        if self._is_same and not (path.is_file() and path.read_bytes() == aside.read_bytes()):
            self._is_same = False  # a run with other settings: its rows and ours would be read as one data set
            for later in reversed(self._standing(self._files)):
                later.unlink()
        aside.rename(path)
        self._rows, self._files = [], self._files + 1

    def _standing(self, first: int) -> list[Path]:
        """The files that are there, from this number on."""
        return [path for path in sorted(self._folder.glob("rows-?????.parquet")) if int(path.stem[5:]) >= first]


RowFiles = JsonLines | ParquetFiles


def open_rows(folder: Path, settings: OutputSection, schema: pyarrow.Schema) -> RowFiles:
    """The files of a folder: rows.jsonl, or rows-00000.parquet and so on.

    Raises OSError, and UserError where rows of the other format are in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    other = sorted(folder.glob("rows-?????.parquet" if settings.format == "jsonl" else "rows.jsonl"))
    if other:
        raise UserError(
            f"output_dir: {other[0]} is of an earlier run with another output.format, and both would be read as "
            "one data set. Move it away, or name another folder. The journal may stay: nothing is asked again."
        )
    if settings.format == "jsonl":
        return JsonLines(folder / "rows.jsonl")
    return ParquetFiles(folder, settings.rows_per_file, schema)
