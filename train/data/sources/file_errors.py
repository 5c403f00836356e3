"""Errors of data files whose content is not what their extension says: encoding, file format, layout of JSON.

A file is recognized by its first bytes (`check_head`); a JSON file, or a line of one, by the position where it stops
being JSON (`document_error`, `line_error`). Where a shell command converts the file, the message holds it.
"""

import csv
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from train.data.sources.row_errors import PYTHON, RowError, is_python
from train.errors import UserError

BYTES_OF_HEAD = 4096
_BLANKS = " \t\r\n"
"""JSON's white space. Python strips other characters too, which messages must show."""
_RECORD_SEPARATOR = "\x1e"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Signature(NamedTuple):
    """First bytes of a file that is not read. `unpack`: the program that unpacks it. `in_pickles`: of pickles too."""

    start: bytes
    kind: str
    remedy: str = ""
    unpack: str = ""
    in_pickles: bool = False


_PICKLE = ("a Python pickle", "Change its extension to .pkl, if you trust it")
_SIGNATURES = (
    _Signature(b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "Run: git lfs pull", in_pickles=True),
    _Signature(b"/annex/objects/", "a git-annex pointer", "Run: git annex get", in_pickles=True),
    _Signature(b"PAR1", "a Parquet file", "Change its extension to .parquet"),
    _Signature(b"ARROW1", "an Arrow file", "Write it as Parquet"),
    _Signature(b"PK\x03\x04", "a ZIP archive", "Unpack it, and name the file in it"),
    _Signature(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it, and name the file in it"),
    _Signature(b"\xd0\xcf\x11\xe0", "an Excel or another Office file", "Save it as CSV in UTF-8"),
    _Signature(b"SQLite format 3\x00", "a SQLite database", "Write its rows as JSON lines"),
    _Signature(b"%PDF-", "a PDF", "Name a file of rows"),
    _Signature(b"\x89HDF", "an HDF5 file", "Write its rows as JSON lines"),
    _Signature(b"\x80\x04", *_PICKLE),
    _Signature(b"\x80\x05", *_PICKLE),
    _Signature(b"\x1f\x8b", "compressed twice with gzip", unpack="gunzip -c", in_pickles=True),
    _Signature(b"\x28\xb5\x2f\xfd", "compressed twice with zstd", unpack="zstd -dc", in_pickles=True),
    _Signature(b"BZh", "compressed with bzip2", unpack="bunzip2 -c", in_pickles=True),
    _Signature(b"\xfd7zXZ\x00", "compressed with xz", unpack="xz -dc", in_pickles=True),
)
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|head|body|\?xml[^>]*>\s*<(error|html|!doctype))", re.IGNORECASE)
_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')
_LINES_EXAMINED = 20


@dataclass(frozen=True, slots=True)
class _Layout:
    """A layout of JSON that is not read, and the program that converts it to JSON lines."""

    description: str
    program: str


_LITERAL = "print(json.dumps(ast.literal_eval({})))"
_COMMA = _Layout("a comma follows the object", "sed 's/,[[:space:]]*$//'")
_PYTHON = _Layout(
    "it is a Python dict (single quotes, None, True), not JSON",
    "python3 -c 'import ast, json, sys; [" + _LITERAL.format("line") + " for line in sys.stdin if line.strip()]'",
)
_PYTHON_LIST = _Layout(
    f"it is {PYTHON}",
    "python3 -c 'import ast, json, sys; " + _LITERAL.format("sys.stdin.read()") + "'",
)
_SEVERAL = _Layout("several objects are on one line", "jq -c .")
_SPREAD = _Layout("each object spans several lines", "jq -c .")
_SPREAD_ONE = _Layout("an object spans several lines", "jq -c .")
_JOINED = _Layout(
    "a byte order mark (EF BB BF) inside the file, where another file was joined to it",
    r"sed 's/^\xEF\xBB\xBF//'",
)


def check_head(path: Path, head: bytes, extension: str, *, pickled: bool) -> None:
    """Raise UserError if the first bytes of a file, unpacked, are not those of a file with this extension."""
    kind = remedy = ""
    for signature in _SIGNATURES:
        if not head.startswith(signature.start) or (pickled and not signature.in_pickles):
            continue
        if signature.kind != "a Parquet file" or extension != ".parquet":
            kind, remedy = signature.kind, f"{signature.remedy}."
        if signature.unpack:
            remedy = f"Unpack it: {conversion_command(path, signature.unpack, 'unpacked')}"
    if kind == "a ZIP archive" and (b"[Content_Types].xml" in head or b"xl/" in head):
        kind, remedy = "an Excel workbook", "Save it as CSV in UTF-8."
    if _WEB_PAGE.match(head):
        kind, remedy = "a web page (HTML or XML), not the data", "Download the file that the page links to."
    if kind:
        raise UserError(f"{path}: the file is {kind}. {remedy}")
    if not pickled and extension != ".parquet":
        _check_encoding(path, head)
    if extension in (".csv", ".tsv") and _JSON.match(head):
        raise UserError(f"{path}: the file holds JSON, not a table. Change its extension to .jsonl.")
    if extension in (".csv", ".tsv") and b"\r" in head[:-1] and b"\n" not in head:
        command = conversion_command(path, r"tr '\r' '\n'", "lines")
        raise UserError(f"{path}: its lines end with a carriage return alone (old Macintosh). Convert it: {command}")


def _check_encoding(path: Path, head: bytes) -> None:
    """Raise UserError for UTF-16 and UTF-32, recognized by the first two characters (RFC 4627, section 3)."""
    if not head.strip(b"\0"):
        raise UserError(f"{path}: the file begins with zero bytes, as an incomplete copy does. Copy it again.")
    encoding = json.detect_encoding(head)
    if encoding.startswith("utf-8"):
        return
    if "\ufffd" in head[: len(head) // 4 * 4].decode(encoding, "replace")[:-1]:
        raise UserError(f"{path}: the file holds binary data, not text. Name a file of rows.")
    family, _, order = encoding.partition("-")[2].partition("-")
    first_bytes = head[: 4 if family == "32" else 2].hex(" ").upper()
    start = f"the bytes {first_bytes}" if order else f"the byte order mark {first_bytes}"
    command = conversion_command(path, f"iconv -f UTF-{family}{order.upper()} -t UTF-8", "utf8")
    raise UserError(
        f"{path}: the file is UTF-{family} text (it begins with {start}); it must be UTF-8. Convert it: {command}"
    )


def conversion_command(path: Path, program: str, addition: str, extension: str = "") -> str:
    """Return a shell command that sends a file through `program` into a new file beside it, named with `addition`."""
    unpack = {".gz": "gunzip -c", ".zst": "zstd -dc"}.get(path.suffix.lower())
    plain = path.with_suffix("") if unpack else path
    target = shlex.quote(str(plain.with_name(f"{plain.stem}.{addition}{extension or plain.suffix}")))
    source = shlex.quote(str(path))
    if unpack:
        return f"{unpack} {source} | {program} > {target}"
    reads_stdin = program.startswith(("python", "tr "))
    return f"{program} < {source} > {target}" if reads_stdin else f"{program} {source} > {target}"


def is_document(lines: Sequence[bytes]) -> bool:
    """Return whether a file that begins with these lines is one JSON value, or several that span lines."""
    first = _first_line(lines)
    if first[:1] == b"[":
        return True
    if first[:1] != b"{" or _is_object(first):
        return False
    text = b"".join(lines).decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:  # broken, or longer than these lines
        continues = isinstance(error, json.JSONDecodeError) and _is_cut(_json_error(first))
        return continues and not any(map(_is_object, lines[:_LINES_EXAMINED]))
    return "\n" in text[:end]


def check_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Raise UserError if the first lines share a layout that is not JSON lines."""
    first = _first_line(lines)
    if not first or any(map(_is_object, lines[:_LINES_EXAMINED])):
        return
    error = _json_error(first)
    layout = _find_layout(first.decode("utf-8", "replace"), error) if error else None
    if layout is not None:
        raise _conversion_error(path, path, layout)
    if error is not None and error.pos == 0:
        raise _not_json(path, error.doc)


def check_one_per_line(path: Path, first: int, lines: Sequence[bytes]) -> None:
    """Raise UserError if an object spans several of these lines. `first`: the number of the first line."""
    starts = [
        number
        for number, line in enumerate(lines)
        if (stripped := line.strip()).startswith(b"{") and not stripped.endswith(b"}")
    ]
    if not starts:
        return
    texts = [line.decode("utf-8", "replace") for line in lines]
    ends = list(accumulate(map(len, texts)))
    joined = "".join(texts)
    for number in starts:
        try:
            _, end = json.JSONDecoder().raw_decode(joined, joined.index("{", ends[number] - len(texts[number])))
        except (ValueError, RecursionError):  # broken or cut off: an error of this row alone
            continue
        if end > ends[number]:
            raise _conversion_error(f"{path}:{first + number}", path, _SPREAD_ONE)


def document_error(path: Path, text: str, error: json.JSONDecodeError) -> UserError:
    """Return the error for a file that is neither one JSON value nor, by its first lines, JSON lines."""
    rest = text[error.pos :].lstrip()
    if not text[: error.pos].strip():
        return _not_json(path, text[error.pos :])
    if error.msg == "Extra data" and not rest.startswith((",", "\ufeff")):
        return _conversion_error(path, path, _SPREAD)
    where = f"{path}:{error.lineno}: "
    if error.msg == "Extra data" and rest.startswith("\ufeff"):
        return UserError(
            f"{where}{_JOINED.description}. Remove it: {conversion_command(path, _JOINED.program, 'joined')}"
        )
    invalid = f"{where}invalid JSON: {error.msg} at column {error.colno}"
    if error.msg == "Extra data":
        return UserError(f"{invalid}: objects with commas between them. Put [ before the first and ] after the last.")
    if _is_cut(error):
        return UserError(f"{invalid}: the file ends in the middle of a value. It was cut off: copy it again.")
    if is_python(text):
        return _conversion_error(path, path, _PYTHON_LIST)
    if rest[:1] in ("]", "}") and text[: error.pos].rstrip().endswith(","):
        return UserError(f"{invalid}: a comma precedes the closing {rest[0]}. Remove it.")
    return UserError(f"{invalid}.")


def line_error(line: bytes, error: ValueError | RecursionError, *, ended: bool) -> RowError:
    """Return the error of one line of JSON lines. `ended`: a line break follows it."""
    if b"\0" in line:
        return RowError("not UTF-8", "zero bytes in the line, as in UTF-16 text that was appended to the file")
    if isinstance(error, UnicodeDecodeError):
        return RowError(
            "not UTF-8",
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line{guess_encoding(line, error.start)}",
        )
    if not isinstance(error, json.JSONDecodeError):  # a number of 5,000 digits, 100,000 brackets
        return RowError("invalid JSON", str(error))
    layout = _find_layout(error.doc, error)
    if layout is not None:
        return RowError("invalid JSON", f"{layout.description}: {layout.program} FILE > NEW")
    truncated = f"; the {'line' if ended else 'file'} ends in the middle of the row" if _is_cut(error) else ""
    return RowError("invalid JSON", f"{error.msg} at column {error.colno}{truncated}")


def guess_encoding(text: bytes, index: int) -> str:
    """Return a guess at the encoding of bytes that are not UTF-8, in parentheses, for the one at `index`.

    Single bytes between ASCII are mostly letters of Western Europe; in East Asian encodings bytes come in pairs.
    """
    runs = re.findall(rb"[\x80-\xff]+", text)
    single = sum(len(run) == 1 for run in runs)
    letter = text[index : index + 1].decode("cp1252", "ignore")
    if letter and single and 2 * single >= len(runs):
        return f" (in Windows-1252 it is {letter}: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW)"
    return " (of another encoding, such as GB18030, SHIFT_JIS or CP949: iconv -f NAME -t UTF-8 FILE > NEW)"


def detect_delimiter(header: str, delimiter: str) -> str:
    """Return the delimiter of a table's header: `delimiter`, unless another character alone divides it into cells."""

    def count_cells(character: str) -> int:
        try:
            return len(next(csv.reader([header[:BYTES_OF_HEAD]], delimiter=character), []))
        except csv.Error:
            return 1

    others = [character for character in ",;\t|" if count_cells(character) > 1]
    return others[0] if count_cells(delimiter) == 1 and len(others) == 1 else delimiter


def _conversion_error(where: Path | str, path: Path, layout: _Layout) -> UserError:
    command = conversion_command(path, layout.program, "lines", ".jsonl")
    return UserError(
        f"{where}: {layout.description}. Write one JSON object per line, or one list of all objects. Convert it: "
        f"{command}"
    )


def _not_json(path: Path, text: str) -> UserError:
    text = text.lstrip(_BLANKS)
    if text.startswith(_RECORD_SEPARATOR):
        command = conversion_command(path, r"tr -d '\036'", "lines")
        return UserError(
            f"{path}: the file is a JSON text sequence (RFC 7464), it begins with {text[:20]!r}. Write JSON lines. "
            f"Convert it: {command}"
        )
    first = text.partition("\n")[0].rstrip(_BLANKS)
    table = {",": ".csv", ";": ".csv", "\t": ".tsv"}.get(detect_delimiter(first, "\0"))
    advice = f" A table with a header needs the extension {table}." if table else ""
    return UserError(f"{path}: the file is not JSON, it begins with {first[:60]!r}.{advice}")


def _find_layout(text: str, error: json.JSONDecodeError) -> _Layout | None:
    if text.startswith("\ufeff"):
        return _JOINED
    if error.msg == "Extra data":
        rest = text[error.pos :].strip()
        return _COMMA if rest == "," else _SEVERAL if rest.startswith("{") else None
    return _PYTHON if is_python(text) else None


def _is_cut(error: json.JSONDecodeError | None) -> bool:
    """Return whether the text ends before its JSON value does."""
    return error is not None and (error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip()))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_error(line: bytes) -> json.JSONDecodeError | None:
    try:
        json.loads(line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        return error
    except (ValueError, RecursionError):
        pass
    return None


def _first_line(lines: Sequence[bytes]) -> bytes:
    """Return the first line that isn't blank, stripped."""
    return (
        next((line for line in lines if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
        .removeprefix(BYTE_ORDER_MARK)
        .strip()
    )
