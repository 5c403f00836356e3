"""One file -> its rows, by chunks: jsonl, json, parquet, csv and tsv, also with .gz or .zst; pickles where allowed.

Its name says which of these a file is, its first bytes whether it is compressed, or something else altogether.

A chunk can go to another process before its rows are parsed: lines of JSON travel as bytes, those of parquet as Arrow.
Lines of JSON are parsed one by one, not through Arrow, which would put every key of any row into all of them, as null.
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
    BYTES_OF_A_HEAD,
    check_head,
    check_lines,
    check_one_a_line,
    delimiter_of,
    document_fault,
    guess,
    is_document,
    line_fault,
)
from train.data.sources.formats import RawRow, RowError, detect
from train.data.sources.row_errors import shown
from train.data.sources.unread_text import lost_text
from train.errors import UserError

PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin")
"""Endings of files that can run code as they are opened."""
ROWS_OF_A_CHUNK = 250
_BYTES_OF_A_CHUNK = 1 << 20

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x50\x2a\x4d\x18": "zstd"}
"""First bytes of compressed files; the last is pzstd's. Downloads may be unpacked whatever their names say."""

_DESCRIPTIONS = frozenset(("description", "info", "name", "citation", "homepage"))
"""Keys of a JSON document that describe it as a whole, beside the rows, as COCO and datasets have them."""

LocatedRow = tuple[str, RawRow | RowError]
"""Where in its file a row stands (":12", " row 12"; from 1), and the row, or why it can't even be read."""


class Chunk(Protocol):
    """Some rows that follow one another in a file. The same file has the same chunks each time."""

    def rows(self) -> Iterator[LocatedRow]:
        """The rows, parsed now."""
        ...

    def __len__(self) -> int:
        """How many rows there are, without parsing them."""
        ...


@dataclass(frozen=True, slots=True)
class ParsedRows:
    """Rows of files that can only be parsed as a whole."""

    placed: list[LocatedRow]

    def rows(self) -> Iterator[LocatedRow]:
        """The rows."""
        return iter(self.placed)

    def __len__(self) -> int:
        return len(self.placed)


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines that hold a JSON object each, or nothing."""

    first: int
    lines: list[bytes]

    def rows(self) -> Iterator[LocatedRow]:
        """The rows of the lines that aren't empty."""
        for number, line in enumerate(self.lines, self.first):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)  # the mark that Windows programs put first
            content = line.strip()
            if content:
                yield f":{number}", _parsed(content, line)

    def __len__(self) -> int:
        return sum(not line.isspace() for line in self.lines)


def read_file(path: Path, allow_pickle: bool) -> Iterator[Chunk]:
    """The rows of one file. Raises UserError."""
    ending = ending_of(path)
    if ending in PICKLES and not allow_pickle:
        raise UserError(
            f"{path}: a pickle can run code as it is opened. Convert it to jsonl or parquet, or, if you trust where it "
            "comes from, write `data.allow_pickle: true`."
        )
    if ending not in READERS:
        known = ", ".join(ending for ending in READERS if ending not in PICKLES)
        raise UserError(f"{path}: the ending `{ending}` is unknown. Known are {known}, each also with .gz or .zst.")
    empty = True
    try:
        if path.stat().st_size:
            with _open(path) as stream:
                check_head(path, stream.read(BYTES_OF_A_HEAD), ending, pickled=ending in PICKLES)
            for chunk in READERS[ending](path):
                empty = False
                yield chunk
    except (OSError, pyarrow.ArrowException) as fault:
        reason = getattr(fault, "strerror", None) or first_line(fault)
        raise UserError(f"{path}: can't be read: {reason}. Is it whole, and is its ending right?") from fault
    if empty:
        raise UserError(f"{path}: the file holds no rows.")


def ending_of(path: Path) -> str:
    """`.jsonl` of rows.jsonl and of rows.JSONL.gz."""
    return Path(path.stem if path.suffix.lower() in _COMPRESSIONS else path.name).suffix.lower()


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked. It is opened by Python, as Arrow takes no path that isn't UTF-8."""
    stream = path.open("rb")
    compression = _COMPRESSED.get(stream.peek(4)[:4]) or _COMPRESSED.get(stream.peek(2)[:2])
    return io.BufferedReader(pyarrow.input_stream(stream, compression=compression)) if compression else stream


def _lines(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        first = stream.readlines(_BYTES_OF_A_CHUNK)
        if not is_document(first):
            yield from _chunks_of_lines(path, stream, first)
            return
    yield from _document(path)


def _chunks_of_lines(path: Path, stream: io.BufferedIOBase, lines: list[bytes]) -> Iterator[Chunk]:
    """The rows of `lines`, which were read already, and of all that follow."""
    check_lines(path, lines)
    first = 1
    while lines:
        check_one_a_line(path, first, lines)
        if not all(map(bytes.isspace, lines)):
            yield Lines(first, lines)
        first += len(lines)
        lines = stream.readlines(_BYTES_OF_A_CHUNK)


def _chunks(rows: Iterable[LocatedRow]) -> Iterator[Chunk]:
    remaining = iter(rows)
    while placed := list(islice(remaining, ROWS_OF_A_CHUNK)):
        yield ParsedRows(placed)


def _parsed(content: bytes, line: bytes) -> RawRow | RowError:
    """The row that `content` says, which is all of `line` but blanks and its line break."""
    try:
        row = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        return line_fault(content, fault, ended=line.endswith(b"\n"))
    return _as_row(row)


def _as_row(value: Any) -> RawRow | RowError:
    if isinstance(value, dict):
        return value
    return RowError("wrong type", f"the row is of type {type(value).__name__}; an object with named columns is wanted")


def _document(path: Path) -> Iterator[Chunk]:
    with _open(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        return
    try:
        document = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        start = max(0, fault.start - 100)
        what = f"byte 0x{content[fault.start]:02x}{guess(content[start : fault.start + 100], fault.start - start)}"
        raise UserError(f"{path}:{line}: not UTF-8: {what}. Save it as UTF-8.") from fault
    except json.JSONDecodeError as fault:
        if fault.msg != "Extra data" or "\n" in fault.doc[: fault.pos].strip():
            raise document_fault(path, fault.doc, fault) from fault
        stream = io.BytesIO(content)  # several objects, one a line: many call that .json too
        yield from _chunks_of_lines(path, stream, stream.readlines(_BYTES_OF_A_CHUNK))
        return
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{path}: invalid JSON: {fault}.") from fault
    yield from _chunks(_rows_within(document, path))


def _rows_within(document: Any, path: Path) -> Iterator[LocatedRow]:
    """Rows of a list; of the one list that an object holds; of an object that is a row, or that holds rows by id."""
    rows: Iterable[Any] | None = document if isinstance(document, list) else None
    if isinstance(document, dict):
        with suppress(UserError):
            detect(document)
            rows = [document]
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        if rows is None and len(lists) == 1:
            ((key, rows),) = lists.items()
            _check_beside(document, key, path)
        elif rows is None and not lists and all(isinstance(value, dict) for value in document.values()):
            rows = document.values()
    if rows is None:
        keys = ", ".join(map(str, document))[:100] if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{path}: a list of rows, or an object with one list under it, is wanted; found: {keys}.")
    for number, row in enumerate(rows, 1):
        yield f" row {number}", _as_row(row)


def _check_beside(document: dict[Any, Any], rows: Any, path: Path) -> None:
    """Raise UserError where a key beside that of the rows holds content, which would be lost: a system prompt, say."""
    for key, value in document.items():
        if key == rows or key in _DESCRIPTIONS:
            continue
        if (text := lost_text(str(key), [value], ())) is not None:
            raise UserError(
                f"{path}: `{key}` beside the rows (`{rows}`) holds content that no row has: {shown(text)}. Put it into "
                "the rows, or take it out of the file."
            )


def _parquet(path: Path) -> Iterator[Chunk]:
    with _open(path) as stream:
        # It is read from its end, so one that is compressed must be whole in memory.
        where = stream if isinstance(stream.raw, io.FileIO) else pyarrow.BufferReader(stream.read())
        with pyarrow.parquet.ParquetFile(where) as table:
            _check_names(table.schema_arrow.names, str(path))
            yield from arrow_chunks(table.iter_batches(ROWS_OF_A_CHUNK))


def _table(path: Path, delimiter: str) -> Iterator[Chunk]:
    return _chunks(_cells(path, delimiter))


def _cells(path: Path, delimiter: str) -> Iterator[LocatedRow]:
    """Rows of a table with a header; every cell is text, as it is written. Places are lines, where a row begins."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit is 131,072 characters: some prompts are longer
    undecodable: dict[int, str] = {}

    def decoded(stream: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as fault:
                undecodable[number] = f"line {number}: byte 0x{line[fault.start]:02x}{guess(line, fault.start)}"
                yield line.decode("utf-8", errors="replace")

    with _open(path) as stream:
        lines = decoded(stream)
        first_line = next(lines, "")
        skipped = 0
        if named := re.fullmatch(r'"?sep=(.)"?\s*', first_line, re.IGNORECASE):  # Excel's own line
            skipped, delimiter, first_line = 1, named[1], next(lines, "")
        else:
            delimiter = delimiter_of(first_line, delimiter)
        table = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            first = table.line_num + 1 + skipped
            row: RawRow | RowError
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as fault:
                row = RowError("invalid CSV", str(fault))
            else:
                if header is None:
                    header = _header(cells, path)
                    continue
                if not cells:
                    continue
                row = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row = RowError("invalid CSV", f"{len(cells)} cells where the header names {len(header)}")
            wrong = [line for line in range(first, table.line_num + 1 + skipped) if line in undecodable]
            yield f":{first}", RowError("not UTF-8", undecodable[wrong[0]]) if wrong else row


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    _check_names(names, f"{path}:1")
    return names


def _check_names(names: list[str], where: str) -> None:
    """Raise UserError where two columns share a name, so that a row can't hold both."""
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two columns share a name: {', '.join(names)}. Rename one of them.")


def _pickle(path: Path) -> Iterator[Chunk]:
    """Rows of a pickled list or data frame. Only called where the recipe allows it."""
    try:
        with _open(path) as stream:
            if ending_of(path) in (".pt", ".pth"):
                import torch

                document = torch.load(io.BytesIO(stream.read()), weights_only=False)
            else:
                document = pickle.load(stream)
    except Exception as fault:  # opening a pickle runs whatever it says
        raise UserError(f"{path}: the pickle can't be opened: {type(fault).__name__}: {first_line(fault)}.") from fault
    if hasattr(document, "notna"):  # a data frame has NaN where a cell is empty
        document = document.astype(object).where(document.notna(), None).to_dict("records")
    yield from _chunks(_rows_within(document, path))


READERS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _document,
    ".parquet": _parquet,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    **dict.fromkeys(PICKLES, _pickle),
}


def first_line(fault: BaseException) -> str:
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0].strip(" .")[:300]
