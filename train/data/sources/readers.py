"""Readers: one file -> its rows, by chunks. jsonl, json, parquet, csv and tsv, also with .gz or .zst; allowed pickles.

The extension decides the format; the first bytes show compression, or that the file is something else.

A chunk can go to another process before its rows are parsed: JSON lines travel as bytes, rows of parquet as Arrow.
JSON lines are parsed one by one, not by Arrow, which would put every key of any row into all of them, as null.
"""

import csv
import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from train.data.sources.arrow import arrow_chunks
from train.data.sources.file_errors import (
    BYTE_ORDER_MARK,
    BYTES_OF_HEAD,
    check_head,
    check_lines,
    check_one_per_line,
    detect_delimiter,
    document_error,
    guess_encoding,
    is_document,
    line_error,
)
from train.data.sources.formats import RawRow, RowError, detect
from train.data.sources.row_errors import preview
from train.data.sources.unread_text import find_lost_text
from train.errors import UserError

PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin")
"""Extensions of files that can run code when they are opened."""
ROWS_PER_CHUNK = 250
_BYTES_PER_CHUNK = 1 << 20

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x50\x2a\x4d\x18": "zstd"}
"""First bytes of compressed files; the last are pzstd's. A download may be unpacked whatever its name says."""

_DESCRIPTIONS = frozenset(("description", "info", "name", "citation", "homepage"))
"""Keys beside the rows of a JSON document that describe the document, as in COCO and datasets."""

LocatedRow = tuple[str, RawRow | RowError]
"""The place of a row in its file (":12", " row 12"; from 1), and the row, or why it can't be parsed."""


class Chunk(Protocol):
    """Consecutive rows of a file. The same file has the same chunks each time."""

    def rows(self) -> Iterator[LocatedRow]:
        """Yield each row with its place; they are parsed now."""
        ...

    def __len__(self) -> int:
        """Return the number of rows, without parsing them."""
        ...


@dataclass(frozen=True, slots=True)
class ParsedRows:
    """A chunk of a file that can only be parsed completely."""

    placed: list[LocatedRow]

    def rows(self) -> Iterator[LocatedRow]:
        """Yield each row with its place."""
        return iter(self.placed)

    def __len__(self) -> int:
        return len(self.placed)


@dataclass(frozen=True, slots=True)
class Lines:
    """A chunk of JSON lines. `first`: the number of the first line."""

    first: int
    lines: list[bytes]

    def rows(self) -> Iterator[LocatedRow]:
        """Yield the row of each line that isn't blank, with its place."""
        for number, line in enumerate(self.lines, self.first):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)  # the mark that Windows programs put first
            content = line.strip()
            if content:
                yield f":{number}", _parse_line(content, line)

    def __len__(self) -> int:
        return sum(not line.isspace() for line in self.lines)


def read_file(path: Path, allow_pickle: bool) -> Iterator[Chunk]:
    """Yield the chunks of one file. Raises UserError if it can't be read or holds no rows."""
    extension = extension_of(path)
    if extension in PICKLES and not allow_pickle:
        raise UserError(
            f"{path}: a pickle can run code when it is opened. Convert it to jsonl or parquet, or, if you trust its "
            "source, write `data.allow_pickle: true`."
        )
    if extension not in READERS:
        supported = ", ".join(extension for extension in READERS if extension not in PICKLES)
        raise UserError(
            f"{path}: the file extension `{extension}` is not supported. Write one of {supported}, each also with .gz "
            "or .zst."
        )
    empty = True
    try:
        if path.stat().st_size:
            with _open(path) as stream:
                check_head(path, stream.read(BYTES_OF_HEAD), extension, pickled=extension in PICKLES)
            for chunk in READERS[extension](path):
                empty = False
                yield chunk
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: can't be read: {reason}. Is it complete, and is its extension right?") from error
    if empty:
        raise UserError(f"{path}: the file holds no rows.")


def extension_of(path: Path) -> str:
    """Return the extension below any compression: `.jsonl` of rows.jsonl and of rows.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() in _COMPRESSIONS else path.name).suffix.lower()


def _open(path: Path) -> io.BufferedReader:
    """Open a file and unpack it. Python opens it, as Arrow takes no path that isn't UTF-8."""
    stream = path.open("rb")
    compression = _COMPRESSED.get(stream.peek(4)[:4]) or _COMPRESSED.get(stream.peek(2)[:2])
    return io.BufferedReader(pyarrow.input_stream(stream, compression=compression)) if compression else stream


def _read_lines(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        first = stream.readlines(_BYTES_PER_CHUNK)
        if not is_document(first):
            yield from _chunks_of_lines(path, stream, first)
            return
    yield from _read_document(path)


def _chunks_of_lines(path: Path, stream: io.BufferedIOBase, lines: list[bytes]) -> Iterator[Chunk]:
    """Yield the chunks of `lines`, which were read from `stream` already, and of the lines that follow."""
    check_lines(path, lines)
    first = 1
    while lines:
        check_one_per_line(path, first, lines)
        if not all(map(bytes.isspace, lines)):
            yield Lines(first, lines)
        first += len(lines)
        lines = stream.readlines(_BYTES_PER_CHUNK)


def _chunks(rows: Iterable[LocatedRow]) -> Iterator[Chunk]:
    remaining = iter(rows)
    while placed := list(islice(remaining, ROWS_PER_CHUNK)):
        yield ParsedRows(placed)


def _parse_line(content: bytes, line: bytes) -> RawRow | RowError:
    """Parse the row in `content`, which is `line` without white space at its ends."""
    try:
        row = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return line_error(content, error, ended=line.endswith(b"\n"))
    return _check_row(row)


def _check_row(value: Any) -> RawRow | RowError:
    if isinstance(value, dict):
        return value
    return RowError("wrong type", f"the row is of type {type(value).__name__}; it must be an object with columns")


def _read_document(path: Path) -> Iterator[Chunk]:
    with _open(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        return
    try:
        document = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = max(0, error.start - 100)
        guess = guess_encoding(content[start : error.start + 100], error.start - start)
        description = f"byte 0x{content[error.start]:02x}{guess}"
        raise UserError(f"{path}:{line}: not UTF-8: {description}. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or "\n" in error.doc[: error.pos].strip():
            raise document_error(path, error.doc, error) from error
        stream = io.BytesIO(content)  # several objects, one per line: often named .json too
        yield from _chunks_of_lines(path, stream, stream.readlines(_BYTES_PER_CHUNK))
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON: {error}.") from error
    yield from _chunks(_rows_within(document, path))


def _rows_within(document: Any, path: Path) -> Iterator[LocatedRow]:
    """Yield the rows of a list, of the only list in an object, of an object that is a row or holds rows by id."""
    rows: Iterable[Any] | None = document if isinstance(document, list) else None
    if isinstance(document, dict):
        with suppress(UserError):
            detect(document)
            rows = [document]
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        if rows is None and len(lists) == 1:
            ((key, rows),) = lists.items()
            _check_other_keys(document, key, path)
        elif rows is None and not lists and all(isinstance(value, dict) for value in document.values()):
            rows = document.values()
    if rows is None:
        keys = ", ".join(map(str, document))[:100] if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{path}: the file must be a list of rows, or an object with one list in it; found: {keys}.")
    for number, row in enumerate(rows, 1):
        yield f" row {number}", _check_row(row)


def _check_other_keys(document: dict[Any, Any], rows: Any, path: Path) -> None:
    """Raise UserError if a key beside that of the rows holds content, such as a system prompt: it would be lost."""
    for key, value in document.items():
        if key == rows or key in _DESCRIPTIONS:
            continue
        if (text := find_lost_text(str(key), [value], ())) is not None:
            raise UserError(
                f"{path}: `{key}` beside the rows (`{rows}`) holds content that no row has: {preview(text)}. Put it "
                "into the rows, or remove it from the file."
            )


def _read_parquet(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        # Parquet is read from its end, so a compressed file must be unpacked in memory.
        source = stream if isinstance(stream.raw, io.FileIO) else pyarrow.BufferReader(stream.read())
        with pyarrow.parquet.ParquetFile(source) as table:
            _check_names(table.schema_arrow.names, str(path))
            yield from arrow_chunks(table.iter_batches(ROWS_PER_CHUNK))


def _read_table(path: Path, delimiter: str) -> Iterator[Chunk]:
    return _chunks(_read_cells(path, delimiter))


def _read_cells(path: Path, delimiter: str) -> Iterator[LocatedRow]:
    """Yield the rows of a table with a header. Every cell is a text, unchanged. A place is a row's first line."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit is 131,072 characters: prompts may be longer
    undecodable: dict[int, str] = {}

    def decoded(stream: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                undecodable[number] = (
                    f"line {number}: byte 0x{line[error.start]:02x}{guess_encoding(line, error.start)}"
                )
                yield line.decode("utf-8", errors="replace")

    with _open(path) as stream:
        lines = decoded(stream)
        first_line = next(lines, "")
        skipped = 0
        if separator := re.fullmatch(r'"?sep=(.)"?\s*', first_line, re.IGNORECASE):  # Excel's own line
            skipped, delimiter, first_line = 1, separator[1], next(lines, "")
        else:
            delimiter = detect_delimiter(first_line, delimiter)
        table = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            first = table.line_num + 1 + skipped
            row: RawRow | RowError
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                row = RowError("invalid CSV", str(error))
            else:
                if header is None:
                    header = _header(cells, path)
                    continue
                if not cells:
                    continue
                row = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row = RowError("invalid CSV", f"{len(cells)} cells where the header names {len(header)}")
            bad_lines = [line for line in range(first, table.line_num + 1 + skipped) if line in undecodable]
            yield f":{first}", RowError("not UTF-8", undecodable[bad_lines[0]]) if bad_lines else row


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    _check_names(names, f"{path}:1")
    return names


def _check_names(names: list[str], where: str) -> None:
    """Raise UserError if two columns have the same name, as a row can't hold both."""
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two columns have the same name: {', '.join(names)}. Rename one of them.")


def _read_pickle(path: Path) -> Iterator[Chunk]:
    """Yield the rows of a pickled list or data frame, if the recipe allows pickles."""
    try:
        with _open(path) as stream:
            if extension_of(path) in (".pt", ".pth"):
                import torch

                document = torch.load(io.BytesIO(stream.read()), weights_only=False)
            else:
                document = pickle.load(stream)
    except Exception as error:  # a pickle runs any code
        raise UserError(f"{path}: the pickle can't be opened: {type(error).__name__}: {first_line(error)}.") from error
    if hasattr(document, "notna"):  # a data frame has NaN where a cell is empty
        document = document.astype(object).where(document.notna(), None).to_dict("records")
    yield from _chunks(_rows_within(document, path))


READERS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_document,
    ".parquet": _read_parquet,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    **dict.fromkeys(PICKLES, _read_pickle),
}


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip(" .")[:300]
