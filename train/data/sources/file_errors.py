"""Names for what a data file holds in place of what its ending says: another encoding, file format or layout of JSON.

A file is named by its first bytes (`check_head`), a JSON file or a line of one by where it stops being JSON
(`document_fault`, `line_fault`). Where a command mends it, the message holds the command.
"""

import csv
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from train.data.sources.row_errors import PYTHON, RowError, is_python
from train.errors import UserError

BYTES_OF_A_HEAD = 4096
_BLANKS = " \t\r\n"
"""Blanks of JSON; Python strips other characters too, which a message is to show."""
_RECORD_SEPARATOR = "\x1e"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("a Git LFS pointer", "Fetch the data: git lfs pull"),
    b"/annex/objects/": ("a git-annex pointer", "Fetch the data: git annex get"),
}
_BINARY = {
    b"PAR1": ("a Parquet file", "Give its name the ending .parquet"),
    b"ARROW1": ("an Arrow file", "Write it as Parquet"),
    b"PK\x03\x04": ("a ZIP archive", "Unpack it, and name what was in it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it, and name what was in it"),
    b"\xd0\xcf\x11\xe0": ("an Excel or another Office file", "Save it as CSV in UTF-8"),
    b"SQLite format 3\x00": ("a SQLite database", "Write its rows as JSON lines"),
    b"%PDF-": ("a PDF", "Name a file of rows"),
    b"\x89HDF": ("an HDF5 file", "Write its rows as JSON lines"),
    b"\x80\x04": ("a Python pickle", "Give its name the ending .pkl, if you trust it"),
    b"\x80\x05": ("a Python pickle", "Give its name the ending .pkl, if you trust it"),
}
_COMPRESSED = {
    b"\x1f\x8b": ("compressed twice with gzip", "gunzip -c"),
    b"\x28\xb5\x2f\xfd": ("compressed twice with zstd", "zstd -dc"),
    b"BZh": ("compressed with bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\x00": ("compressed with xz", "xz -dc"),
}
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|head|body|\?xml[^>]*>\s*<(error|html|!doctype))", re.IGNORECASE)
_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')
_LINES_LOOKED_AT = 20


@dataclass(frozen=True, slots=True)
class _Layout:
    """A layout of JSON that is not read: what it is, and a program that makes JSON lines of it."""

    what: str
    program: str


_LITERAL = "print(json.dumps(ast.literal_eval({})))"
_COMMA = _Layout("a comma stands after the object", "sed 's/,[[:space:]]*$//'")
_PYTHON = _Layout(
    "it is a Python dict (single quotes, None, True), not JSON",
    "python3 -c 'import ast, json, sys; [" + _LITERAL.format("line") + " for line in sys.stdin if line.strip()]'",
)
_PYTHON_LIST = _Layout(
    f"it is {PYTHON}",
    "python3 -c 'import ast, json, sys; " + _LITERAL.format("sys.stdin.read()") + "'",
)
_SEVERAL = _Layout("several objects stand on one line", "jq -c .")
_SPREAD = _Layout("the objects stand over several lines each", "jq -c .")
_SPREAD_ONE = _Layout("an object stands over several lines", "jq -c .")
_JOINED = _Layout(
    "a byte order mark (EF BB BF) inside the file, where another file was joined to it",
    r"sed 's/^\xEF\xBB\xBF//'",
)


def check_head(path: Path, head: bytes, ending: str, *, pickled: bool) -> None:
    """Raise UserError where a file begins, once unpacked, as something else than its ending says."""
    what = remedy = ""
    for start, (name, advice) in (_POINTERS if pickled else _POINTERS | _BINARY).items():
        if head.startswith(start) and not (start == b"PAR1" and ending == ".parquet"):
            what, remedy = name, advice
    if what == "a ZIP archive" and (b"[Content_Types].xml" in head or b"xl/" in head):
        what, remedy = "an Excel workbook", "Save it as CSV in UTF-8"
    for start, (name, program) in _COMPRESSED.items():
        if head.startswith(start):
            what, remedy = name, f"Unpack it: {rewriting(path, program, 'unpacked')}"
    if _WEB_PAGE.match(head):
        what, remedy = "a web page (HTML or XML), not the data", "Download the file itself: the page had a link to it"
    if what:
        raise UserError(f"{path}: the file is {what}. {remedy}{'' if ' > ' in remedy else '.'}")
    if not pickled and ending != ".parquet":
        _check_encoding(path, head)
    if ending in (".csv", ".tsv") and _JSON.match(head):
        raise UserError(f"{path}: the file holds JSON, not a table. Give its name the ending .jsonl.")
    if ending in (".csv", ".tsv") and b"\r" in head[:-1] and b"\n" not in head:
        command = rewriting(path, r"tr '\r' '\n'", "lines")
        raise UserError(f"{path}: its lines end with a carriage return alone (old Macintosh). Convert it: {command}")


def _check_encoding(path: Path, head: bytes) -> None:
    """Raise UserError for UTF-16 and UTF-32, whose first two characters show them (RFC 4627, section 3)."""
    if not head.strip(b"\0"):
        raise UserError(f"{path}: the file begins with zero bytes, as an unfinished copy does. Copy it again.")
    encoding = json.detect_encoding(head)
    if encoding.startswith("utf-8"):
        return
    if "\ufffd" in head[: len(head) // 4 * 4].decode(encoding, "replace")[:-1]:
        raise UserError(f"{path}: the file holds binary data, not text. Name a file of rows.")
    family, _, order = encoding.partition("-")[2].partition("-")
    marked = not order
    begins = head[: 4 if family == "32" else 2].hex(" ").upper()
    how = f"it begins with the byte order mark {begins}" if marked else f"it begins with the bytes {begins}"
    name = f"UTF-{family}{order.upper()}"
    command = rewriting(path, f"iconv -f {name} -t UTF-8", "utf8")
    raise UserError(f"{path}: the file is UTF-{family} text ({how}), and UTF-8 is wanted. Convert it: {command}")


def rewriting(path: Path, program: str, addition: str, ending: str = "") -> str:
    """A shell command that sends the text of `path` through `program` into a new file beside it."""
    unpack = {".gz": "gunzip -c", ".zst": "zstd -dc"}.get(path.suffix.lower())
    plain = path.with_suffix("") if unpack else path
    target = shlex.quote(str(plain.with_name(f"{plain.stem}.{addition}{ending or plain.suffix}")))
    source = shlex.quote(str(path))
    if unpack:
        return f"{unpack} {source} | {program} > {target}"
    return (
        f"{program} < {source} > {target}"
        if program.startswith(("python", "tr "))
        else f"{program} {source} > {target}"
    )


def is_document(lines: Sequence[bytes]) -> bool:
    """Return whether a file that begins with these lines is one JSON value, or several over several lines each."""
    first = _first_line(lines)
    if first[:1] == b"[":
        return True
    if first[:1] != b"{" or _is_object(first):
        return False
    text = b"".join(lines).decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as fault:  # it is broken, or it doesn't end among these lines
        begun = isinstance(fault, json.JSONDecodeError) and _is_cut(_fault_of(first))
        return begun and not any(map(_is_object, lines[:_LINES_LOOKED_AT]))
    return "\n" in text[:end]


def check_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Raise UserError where the first lines have one layout in common that no line of JSON has."""
    first = _first_line(lines)
    if not first or any(map(_is_object, lines[:_LINES_LOOKED_AT])):
        return
    fault = _fault_of(first)
    layout = _layout_of(first.decode("utf-8", "replace"), fault) if fault else None
    if layout is not None:
        raise _refusal(path, path, layout)
    if fault is not None and fault.pos == 0:
        raise _no_json(path, fault.doc)


def check_one_a_line(path: Path, first: int, lines: Sequence[bytes]) -> None:
    """Raise UserError where an object stands over several of these lines. `first`: the number of the first of them."""
    begun = [
        number
        for number, line in enumerate(lines)
        if (bare := line.strip()).startswith(b"{") and not bare.endswith(b"}")
    ]
    if not begun:
        return
    texts = [line.decode("utf-8", "replace") for line in lines]
    ends = list(accumulate(map(len, texts)))
    whole = "".join(texts)
    for number in begun:
        try:
            _, end = json.JSONDecoder().raw_decode(whole, whole.index("{", ends[number] - len(texts[number])))
        except (ValueError, RecursionError):  # broken or cut off: a fault of this row
            continue
        if end > ends[number]:
            raise _refusal(f"{path}:{first + number}", path, _SPREAD_ONE)


def document_fault(path: Path, text: str, fault: json.JSONDecodeError) -> UserError:
    """The error for a file that is not one JSON value, and by the lines that it begins with not one a line either."""
    rest = text[fault.pos :].lstrip()
    if not text[: fault.pos].strip():
        return _no_json(path, text[fault.pos :])
    if fault.msg == "Extra data" and not rest.startswith((",", "\ufeff")):
        return _refusal(path, path, _SPREAD)
    where = f"{path}:{fault.lineno}: "
    if fault.msg == "Extra data" and rest.startswith("\ufeff"):
        return UserError(f"{where}{_JOINED.what}. Take it out: {rewriting(path, _JOINED.program, 'joined')}")
    invalid = f"{where}invalid JSON: {fault.msg} at column {fault.colno}"
    if fault.msg == "Extra data":
        return UserError(f"{invalid}: objects with commas between them. Put [ before the first and ] after the last.")
    if _is_cut(fault):
        return UserError(f"{invalid}: the file ends in the middle of a value. It was cut off: copy it again.")
    if is_python(text):
        return _refusal(path, path, _PYTHON_LIST)
    if rest[:1] in ("]", "}") and text[: fault.pos].rstrip().endswith(","):
        return UserError(f"{invalid}: a comma stands before the closing {rest[0]}. Take it out.")
    return UserError(f"{invalid}.")


def line_fault(line: bytes, fault: ValueError | RecursionError, *, ended: bool) -> RowError:
    """The fault of one line of JSON lines. `ended`: whether a line break stands after it."""
    if b"\0" in line:
        return RowError("not UTF-8", "zero bytes in the line, as where text in UTF-16 was added to the file")
    if isinstance(fault, UnicodeDecodeError):
        return RowError(
            "not UTF-8",
            f"byte 0x{line[fault.start]:02x} at byte {fault.start + 1} of the line{guess(line, fault.start)}",
        )
    if not isinstance(fault, json.JSONDecodeError):  # a number of 5,000 digits, 100,000 brackets
        return RowError("invalid JSON", str(fault))
    layout = _layout_of(fault.doc, fault)
    if layout is not None:
        return RowError("invalid JSON", f"{layout.what}: {layout.program} FILE > NEW")
    cut = f"; the {'line' if ended else 'file'} ends in the middle of the row" if _is_cut(fault) else ""
    return RowError("invalid JSON", f"{fault.msg} at column {fault.colno}{cut}")


def guess(text: bytes, at: int) -> str:
    """Return what bytes that are not UTF-8 may be, to stand after the description of the one `at` this index.

    A single byte among ASCII is a letter of Western Europe as a rule; in East Asian encodings they come in pairs.
    """
    high = re.findall(rb"[\x80-\xff]+", text)
    alone = sum(len(run) == 1 for run in high)
    letter = text[at : at + 1].decode("cp1252", "ignore")
    if letter and alone and 2 * alone >= len(high):
        return f" (in Windows-1252 it is {letter}: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW)"
    return " (of another encoding, such as GB18030, SHIFT_JIS or CP949: iconv -f NAME -t UTF-8 FILE > NEW)"


def delimiter_of(header: str, delimiter: str) -> str:
    """Return the character between the names of a table's header: `delimiter`, unless only another one parts them."""

    def cells(character: str) -> int:
        try:
            return len(next(csv.reader([header[:BYTES_OF_A_HEAD]], delimiter=character), []))
        except csv.Error:
            return 1

    others = [character for character in ",;\t|" if cells(character) > 1]
    return others[0] if cells(delimiter) == 1 and len(others) == 1 else delimiter


def _refusal(where: Path | str, path: Path, layout: _Layout) -> UserError:
    command = rewriting(path, layout.program, "lines", ".jsonl")
    return UserError(
        f"{where}: {layout.what}. One JSON object a line is wanted, or one list of all objects. Convert it: {command}"
    )


def _no_json(path: Path, text: str) -> UserError:
    text = text.lstrip(_BLANKS)
    if text.startswith(_RECORD_SEPARATOR):
        what = "the file is a JSON text sequence (RFC 7464)"
        command = rewriting(path, r"tr -d '\036'", "lines")
        return UserError(f"{path}: {what}, it begins with {text[:20]!r}. JSON lines are wanted. Convert it: {command}")
    first = text.partition("\n")[0].rstrip(_BLANKS)
    table = {",": ".csv", ";": ".csv", "\t": ".tsv"}.get(delimiter_of(first, "\0"))
    advice = f" A table with a header needs the ending {table}." if table else ""
    return UserError(f"{path}: the file holds no JSON, it begins with {first[:60]!r}.{advice}")


def _layout_of(text: str, fault: json.JSONDecodeError) -> _Layout | None:
    if text.startswith("\ufeff"):
        return _JOINED
    if fault.msg == "Extra data":
        rest = text[fault.pos :].strip()
        return _COMMA if rest == "," else _SEVERAL if rest.startswith("{") else None
    return _PYTHON if is_python(text) else None


def _is_cut(fault: json.JSONDecodeError | None) -> bool:
    """Return whether JSON ends before its value does."""
    return fault is not None and (fault.msg.startswith("Unterminated string") or fault.pos >= len(fault.doc.rstrip()))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _fault_of(line: bytes) -> json.JSONDecodeError | None:
    try:
        json.loads(line.decode("utf-8", "replace"))
    except json.JSONDecodeError as fault:
        return fault
    except (ValueError, RecursionError):
        pass
    return None


def _first_line(lines: Sequence[bytes]) -> bytes:
    """The first line that isn't empty."""
    return (
        next((line for line in lines if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
        .removeprefix(BYTE_ORDER_MARK)
        .strip()
    )
