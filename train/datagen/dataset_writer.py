"""Dataset files of a run, JSON lines or Parquet, that a restarted run continues.

A restarted run produces the same rows again from the journal of answers. Rows that are already in a file are compared
and left alone, so that the file only grows; from the first row that differs, the file is rewritten.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow
import pyarrow.parquet

from train.datagen.config import OutputSection
from train.errors import UserError
from train.storage.atomic_write import fsync

LEFT_OUT = "left_out.jsonl"
"""File of the dropped rows, each with its reason."""


class JsonlFile:
    """A file of JSON lines that keeps its content as long as the same lines are written again."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 16)
        self._is_same = True

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; readers see complete lines only."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if self._is_same:
            start = self._file.tell()
            if self._file.read(len(line)) == line:
                return
            self._is_same = False
            self._file.seek(start)
            self._file.truncate()
        self._file.write(line)
        self._file.flush()

    def finish(self) -> None:
        """Remove rows of an earlier run behind the last one, and sync the file to disk."""
        self._file.truncate(self._file.tell())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, with the rows written so far."""
        with suppress(OSError):  # closing retries what a full disk refused; `write` has raised for it
            self._file.close()


class ParquetFiles:
    """Parquet files of `rows_per_file` rows, each renamed to its final name when it is complete."""

    def __init__(self, folder: Path, rows_per_file: int, schema: pyarrow.Schema) -> None:
        self._folder, self._rows_per_file, self._schema = folder, rows_per_file, schema
        self._rows: list[dict[str, Any]] = []
        self._files = 0
        self._is_same = True

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it reaches the disk when its file is full."""
        self._rows.append(dict(row))
        if len(self._rows) == self._rows_per_file:
            self._write_file()

    def finish(self) -> None:
        """Write the last file, and remove files of an earlier run behind it."""
        if self._rows or not self._files:
            self._write_file()
        for path in reversed(self._list_files(self._files)):
            path.unlink()

    def close(self) -> None:
        """Discard the rows of an incomplete file."""
        self._rows = []

    def _write_file(self) -> None:
        path = self._folder / f"rows-{self._files:05d}.parquet"
        partial = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows, self._schema), partial, compression="zstd")
        fsync(partial)
        if self._is_same and not (path.is_file() and path.read_bytes() == partial.read_bytes()):
            self._is_same = False  # a run with other settings: readers would take its rows and ours for one data set
            for later in reversed(self._list_files(self._files)):
                later.unlink()
        partial.rename(path)
        self._rows, self._files = [], self._files + 1

    def _list_files(self, first: int) -> list[Path]:
        """Return the existing files from number `first` on."""
        return [path for path in sorted(self._folder.glob("rows-?????.parquet")) if int(path.stem[5:]) >= first]


RowFiles = JsonlFile | ParquetFiles


def open_row_files(folder: Path, settings: OutputSection, schema: pyarrow.Schema) -> RowFiles:
    """Open the files of a folder: rows.jsonl, or rows-00000.parquet and so on.

    Raises OSError; UserError if the folder holds rows of the other format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    other = sorted(folder.glob("rows-?????.parquet" if settings.format == "jsonl" else "rows.jsonl"))
    if other:
        raise UserError(
            f"output_dir: {other[0]} is of an earlier run with another output.format, and readers would take both for "
            "one data set. Move it away, or name another folder. The journal may stay: no request is repeated."
        )
    if settings.format == "jsonl":
        return JsonlFile(folder / "rows.jsonl")
    return ParquetFiles(folder, settings.rows_per_file, schema)


class DatasetWriter:
    """Writer of a run's files: data sets in folders of their own, and left_out.jsonl.

    Use it in a `with` block; call `finish` after the last row. All methods raise UserError if the disk refuses a
    write; rows written before are complete.

    Args:
        folder: the output folder.
        settings: format of the data sets.
        schemas: Parquet schema of each data set, by the name of its folder.
    """

    def __init__(self, folder: Path, settings: OutputSection, schemas: Mapping[str, pyarrow.Schema]) -> None:
        self._folder = folder
        try:
            self._files: dict[str, RowFiles] = {
                name: open_row_files(folder / name, settings, schema) for name, schema in schemas.items()
            }
            self._files[LEFT_OUT] = JsonlFile(folder / LEFT_OUT)
        except OSError as error:
            raise UserError(f"output_dir: {folder} can't be written to: {error.strerror}.") from error

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a data set or to LEFT_OUT."""
        with self._disk_errors():
            for row in rows:
                self._files[name].write(row)

    def finish(self) -> None:
        """Remove rows of an earlier run behind the last ones, and sync all files to disk."""
        with self._disk_errors():
            for name, files in self._files.items():
                files.finish()
                if name != LEFT_OUT:
                    fsync(self._folder / name)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"output_dir: {self._folder} can't be written to: {error.strerror}. The answers are in the journal: "
                "free some space, and start the same command again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for files in self._files.values():
            files.close()
