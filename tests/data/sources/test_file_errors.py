"""File errors: content that is not what the extension says is recognized, and the command in the message converts it."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from train.data.sources.formats import RowError
from train.data.sources.source import read_conversations, read_rows
from train.errors import UserError
from train.recipe import Source

ROWS = [
    {"system": "Réponds en vers. 🜲", "prompt": "Why is the sky blue?", "output": "Light scatters,\nblue the most."},
    {"system": None, "prompt": "It's “late”, isn't it?", "output": "나는 짧게 답한다."},
    {"system": "Be brief.", "prompt": "True, {or} false: 7?", "output": "42"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PRETTY = "".join(json.dumps(row, ensure_ascii=False, indent=2) + "\n" for row in ROWS)
COMPACT = [json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})] * 2
MARK = "\ufeff"


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read_rows(Source(path=str(path)))]


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "output": ["o"]}), sink)
    return sink.getvalue()


def zipped(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)
    return sink.getvalue()


# name of the file: (its content, what the error must say, whether the rows of the file are what its command gives)
NAMED: dict[str, tuple[bytes | str, list[str], bool]] = {
    "marked_16.jsonl": (LINES.encode("utf-16"), ["UTF-16", "FF FE", "iconv -f UTF-16 -t UTF-8"], True),
    "marked_be.jsonl": ((MARK + LINES).encode("utf-16-be"), ["UTF-16", "FE FF"], True),
    "marked_32.json": (LINES.encode("utf-32"), ["UTF-32", "FF FE 00 00"], True),
    "bare_16.jsonl": (LINES.encode("utf-16-le"), ["UTF-16", "7B 00", "iconv -f UTF-16LE"], True),
    "bare_be.json": (json.dumps(ROWS).encode("utf-16-be"), ["UTF-16", "00 5B", "iconv -f UTF-16BE"], True),
    "bare_32.jsonl": (LINES.encode("utf-32-le"), ["UTF-32", "iconv -f UTF-32LE"], True),
    "excel.csv": ("prompt,output\r\np,ö\r\n".encode("utf-16"), ["UTF-16", "FF FE"], False),
    "packed.jsonl.gz": (gzip.compress(LINES.encode("utf-16")), ["UTF-16", "gunzip -c"], True),
    "pretty.json": (PRETTY, ["object spans several lines", "jq -c ."], True),
    "pretty.jsonl": (PRETTY, ["object spans several lines", "jq -c ."], True),
    "compact.jsonl": ("\n".join(COMPACT).replace("[", "[\n").replace(", {", ",\n{"), ["spans several lines"], False),
    "separated.json": (PRETTY.replace("}\n{", "},\n{"), ["commas between them", "Put [ before"], False),
    "one_line.jsonl": (LINES.replace("\n", " "), ["several objects are on one line", "jq -c ."], True),
    "commas.jsonl": (LINES.replace("}\n", "},\n"), ["comma follows the object", "sed "], True),
    "commas.json": (LINES.replace("}\n", "}, \n"), ["comma follows the object", "sed "], True),
    "python.jsonl": ("".join(f"{row}\n" for row in ROWS), ["Python dict", "python3 -c"], True),
    "python.json": (str(ROWS), ["Python list or dict", "python3 -c"], True),
    "joined.json": (PRETTY.replace("}\n{", "}\n" + MARK + "{", 1), ["joined.json:6: a byte order mark"], False),
    "trailing.json": (json.dumps(ROWS)[:-1] + ",\n]", ["invalid JSON", "comma precedes the closing ]"], False),
    "cut.json": (json.dumps(ROWS)[:-20], ["invalid JSON", "It was cut off"], False),
    "cut_array.jsonl": (json.dumps(ROWS, indent=1)[:-20], ["invalid JSON", "It was cut off"], False),
    "lfs.jsonl": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git LFS", "git lfs pull"], False),
    "lfs.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["Git LFS pointer"], False),
    "annex.csv": ("/annex/objects/SHA256E-s9--0.csv\n", ["git-annex pointer"], False),
    "page.jsonl": ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", ["web page"], False),
    "denied.json": ('<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', ["web page (HTML or XML)"], False),
    "rows.csv": (parquet(), ["Parquet", "extension to .parquet"], False),
    "archive.jsonl": (zipped("rows.jsonl"), ["ZIP archive", "Unpack it"], False),
    "workbook.csv": (zipped("[Content_Types].xml", "xl/sheet.xml"), ["Excel workbook", "CSV in UTF-8"], False),
    "bzip2.jsonl": (bz2.compress(LINES.encode()), ["bzip2", "bunzip2 -c"], True),
    "xz.jsonl": (lzma.compress(LINES.encode()), ["xz", "xz -dc"], True),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES.encode())), ["twice with gzip", "gunzip -c"], True),
    "zeros.jsonl": (b"\0" * 9_000, ["zero bytes", "Copy it again"], False),
    "machine.jsonl": (b"\x7f\x00\x01\xd8\x00\xd8" * 900, ["binary data"], False),
    "table.jsonl": ("prompt,output\np,o\n", ["is not JSON, it begins with 'prompt,output'", "extension .csv"], False),
    "table.json": ("prompt\toutput\np\to\n", ["is not JSON", "extension .tsv"], False),
    "prose.jsonl": ("Once upon a time\nthere were rows\n", ["is not JSON, it begins with 'Once upon a time'"], False),
    "lines.csv": (LINES, ["holds JSON", "extension to .jsonl"], False),
    "array.tsv": (json.dumps(ROWS, indent=1), ["holds JSON", "extension to .jsonl"], False),
    "pickle.jsonl": (b"\x80\x04\x95\x10", ["Python pickle"], False),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_file_of_another_kind_is_recognized_and_its_command_converts_it(name: str, tmp_path: Path) -> None:
    content, words, mended = NAMED[name]
    path = write(tmp_path / name, content)
    error = error_of(path)
    assert error.startswith(str(path))
    assert [word for word in words if word not in error] == []
    command = re.search(r"(?:Convert it|Unpack it|Take it out): (.* > (\S+))$", error.rstrip("."))
    if mended:
        assert command is not None
        if shutil.which(command[1].split()[0]) is None:
            pytest.skip(f"no {command[1].split()[0]}")
        subprocess.run(command[1], shell=True, check=True)
        assert rows_of(Path(command[2])) == ROWS


READ: dict[str, Callable[[], bytes | str]] = {
    "array.jsonl": lambda: json.dumps(ROWS),
    "pretty_array.jsonl": lambda: MARK + "\n" + json.dumps(ROWS, indent=2),
    "array_of_lines.ndjson": lambda: "[\n" + LINES.rstrip().replace("}\n", "},\n") + "\n]\n",
    "object_of_one_list.jsonl": lambda: json.dumps({"version": 1, "data": ROWS}, indent=2),
    "gzip.jsonl": lambda: gzip.compress(LINES.encode()),
    "gzip.json": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "unpacked_on_the_way.jsonl.gz": lambda: LINES,
    "zstd.jsonl": lambda: pyarrow.compress(LINES.encode(), "zstd", asbytes=True),
    "marked.jsonl.gz": lambda: gzip.compress((MARK + LINES).encode()),
}


@pytest.mark.parametrize("name", READ)
def test_an_unambiguous_file_is_read_despite_its_form(name: str, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / name, READ[name]())) == ROWS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("excel.csv", "prompt;output\r\nOne, two?;three\r\n"),
        ("named.csv", "sep=;\r\nprompt;output\r\nOne, two?;three\r\n"),
        ("named_tab.csv", '"sep=\t"\nprompt\toutput\nOne, two?\tthree\n'),
        ("tabs.csv", "prompt\toutput\nOne, two?\tthree\n"),
        ("commas.tsv", '\ufeffprompt,output\n"One, two?",three\n'),
        ("pipes.csv", "prompt|output\nOne, two?|three\n"),
    ],
)
def test_the_header_decides_the_delimiter_of_a_table(name: str, text: str, tmp_path: Path) -> None:
    placed = list(read_rows(Source(path=str(write(tmp_path / name, text)))))
    where = 3 if "sep=" in text else 2
    assert placed == [(f"{tmp_path / name}:{where}", {"prompt": "One, two?", "output": "three"})]


def test_a_table_of_an_old_macintosh(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "prompt,output\rp,o\r")
    command = error_of(path).partition("(old Macintosh). Convert it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert rows_of(tmp_path / "rows.lines.csv") == [{"prompt": "p", "output": "o"}]


def test_a_line_longer_than_any_field_of_a_table(tmp_path: Path) -> None:
    assert "is not JSON" in error_of(write(tmp_path / "rows.jsonl", "x," * 200_000))
    assert "is not JSON" in error_of(write(tmp_path / "mac.jsonl", "one\rtwo"))


def test_an_ambiguous_header_keeps_the_default_delimiter(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "one.csv", 'messages\n"[1, 2]"\n')) == [{"messages": "[1, 2]"}]
    assert rows_of(write(tmp_path / "two.csv", "a;b|c\n1;2|3\n")) == [{"a;b|c": "1;2|3"}]
    assert rows_of(write(tmp_path / "both.csv", "a;b,c\n1;2,3\n")) == [{"a;b": "1;2", "c": "3"}]


def errors_of(path: Path) -> list[str]:
    return [str(row) for row in rows_of(path) if isinstance(row, RowError)]


def test_a_byte_order_mark_where_files_were_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", (MARK + LINES) * 2)
    placed = {place.removeprefix(str(path)): row for place, row in read_rows(Source(path=str(path)))}
    assert [row for row in placed.values() if not isinstance(row, RowError)] == ROWS + ROWS[1:]
    assert "a byte order mark (EF BB BF) inside the file" in str(placed[":4"])
    program = str(placed[":4"]).rpartition(": ")[2].replace("FILE > NEW", f"{path} > {tmp_path}/new.jsonl")
    subprocess.run(program, shell=True, check=True)
    assert rows_of(tmp_path / "new.jsonl") == ROWS + ROWS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1},', "a comma follows the object"),
        ('{"a": 1}{"a": 2}', "several objects are on one line"),
        ("{'a': None}", "Python dict"),
        ('{"a": "' + "x" * 9, "the line ends in the middle of the row"),
        ('{"a": [1, 2', "the line ends in the middle of the row"),
        ('{"a" 1}', "Expecting ':' delimiter at column 6"),
    ],
)
def test_a_bad_line_among_good_ones_is_a_row_error_that_names_its_layout(line: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f"{LINES}{line}\n{LINES}")
    (error,) = errors_of(path)
    assert error.startswith("invalid JSON: ")
    assert words in error
    (first,) = errors_of(write(tmp_path / "first.jsonl", f"{line}\n{LINES}"))
    assert first == error


def test_the_last_line_of_a_file_that_was_cut_off(tmp_path: Path) -> None:
    assert "the file ends in the middle of the row" in errors_of(write(tmp_path / "a.jsonl", LINES[:-9]))[0]
    assert "zero bytes in the line" in errors_of(write(tmp_path / "b.jsonl", LINES.encode() + b"\0" * 99))[0]
    added = LINES.encode() + "{'a': 1}\n".encode("utf-16-le")  # as PowerShell's >> does
    assert "UTF-16 text that was appended" in errors_of(write(tmp_path / "c.jsonl", added))[0]


@pytest.mark.parametrize(
    ("encoding", "text", "words"),
    [
        ("cp1252", "“Où est créée la forêt ?”", "in Windows-1252 it is “: iconv -f WINDOWS-1252"),
        ("latin-1", "Fußgängerübergänge", "in Windows-1252 it is ß"),
        ("gb18030", "你好，世界", "another encoding, such as GB18030"),
        ("shift_jis", "こんにちは", "another encoding"),
        ("cp949", "안녕하세요", "CP949"),
    ],
)
def test_text_in_another_encoding(encoding: str, text: str, words: str, tmp_path: Path) -> None:
    row = {"prompt": text, "output": "o"}
    content = json.dumps(row, ensure_ascii=False).encode(encoding)
    byte = next(byte for byte in content if byte > 127)
    (error,) = errors_of(write(tmp_path / "rows.jsonl", LINES.encode() + content))
    assert error.startswith(f"not UTF-8: byte 0x{byte:02x} at byte {content.index(byte) + 1} of the line")
    assert words in error
    assert words in error_of(write(tmp_path / "rows.json", b"[" + content + b"]"))
    table = f"prompt,output\np,o\n{text},o\n".encode(encoding)
    assert words in errors_of(write(tmp_path / "rows.csv", table))[0]
    name = re.search(r"iconv -f (\S+)", words)
    if name and encoding == "cp1252":
        mended = subprocess.run(["iconv", "-f", name[1], "-t", "UTF-8"], input=content, capture_output=True, check=True)
        assert json.loads(mended.stdout) == row


@pytest.mark.parametrize(
    ("text", "letter"),
    [("Größe? Sehr groß.", "ö"), ("Àéà: é", "À"), ("Das ‚ ist ‘, ß’", "‚"), ("señor, sí", "ñ"), ("20 € für é", "€")],
)
def test_the_letter_in_the_message_is_that_of_its_byte(text: str, letter: str, tmp_path: Path) -> None:
    content = json.dumps({"prompt": text, "output": "o"}, ensure_ascii=False).encode("cp1252")
    words = f" (in Windows-1252 it is {letter}: iconv"
    byte = f"byte 0x{letter.encode('cp1252').hex()}"
    (error,) = errors_of(write(tmp_path / "rows.jsonl", LINES.encode() + content))
    assert byte in error
    assert words in error
    far = b" " * 300  # the letter is looked for near the byte alone
    assert f"{byte}{words}" in error_of(write(tmp_path / "rows.json", b"[" + far + content + far + b"]"))
    table = f"prompt,output\n{text.replace(',', ' ')},o\n".encode("cp1252")
    assert f"{byte}{words}" in errors_of(write(tmp_path / "rows.csv", table))[0]


def test_a_byte_that_windows_1252_does_not_have_gets_no_letter(tmp_path: Path) -> None:
    (error,) = errors_of(write(tmp_path / "rows.jsonl", LINES.encode() + b'{"prompt": "\x81 \xe9 \xe8"}'))
    assert "byte 0x81" in error
    assert "another encoding" in error


@pytest.mark.parametrize(
    "cell",
    [
        str([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]),
        "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant', 'content': 'yo'}]",  # NumPy's, as pandas writes it
        "[{'from': 'human', 'value': \"it's\"}, ...]",
        str([{"role": "user", "content": "it's", "name": None}]),
        '[{"role": "user", "content": None}]',
    ],
)
def test_python_in_a_cell_is_recognized_as_in_a_line(cell: str, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"messages": [cell]})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    ((_, error),) = read_conversations(Source(path=str(tmp_path / "rows.csv")))
    assert isinstance(error, RowError)
    assert "`messages` is a Python list or dict (single quotes, None, True), not JSON" in error.detail
    assert "Write it with json.dumps" in error.detail


def test_json_text_sequences_show_their_separator_and_a_command_that_converts_them(tmp_path: Path) -> None:
    content = "".join(f"\x1e{json.dumps(row)}\n" for row in ROWS)
    for ending in ("jsonl", "json"):
        error = error_of(write(tmp_path / f"rows.{ending}", content))
        assert r"begins with '\x1e{" in error
        assert "a JSON text sequence (RFC 7464)" in error
        command = error.partition("Convert it: ")[2]
        subprocess.run(command, shell=True, check=True)
        new = tmp_path / f"rows.lines.{ending}"
        assert rows_of(new) == ROWS


@pytest.mark.parametrize("character", ["\x1c", "\x85", "\u2028"])
def test_an_invisible_first_character_is_shown(character: str, tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "rows.jsonl", "".join(f"{character}{line}\n" for line in LINES.split("\n"))))
    assert f"it begins with {character!r}"[:-1] in error


@pytest.mark.skipif(shutil.which("jq") is None, reason="the command in the message needs jq")
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (LINES + json.dumps(ROWS[0], indent=2) + "\n" + LINES, 4),
        (LINES + "\n" + PRETTY, 5),
        (LINES.replace("\n", "\r\n") + PRETTY.replace("\n", "\r\n"), 4),
        (LINES + '{"messages": [\n{"role": "user"},\n{"role": "assistant"}]}\n', 4),
        (LINES * 3 + PRETTY.rstrip(), 10),
    ],
)
def test_an_object_over_several_lines_among_others_is_one_error(content: str, line: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    error = error_of(path)
    assert error.startswith(f"{path}:{line}: an object spans several lines")
    subprocess.run(error.partition("Convert it: ")[2], shell=True, check=True)
    content = [json.loads(line) for line in (tmp_path / "rows.lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(content) >= len(ROWS) + 1
    assert rows_of(tmp_path / "rows.lines.jsonl") == content


@pytest.mark.parametrize("line", ['{"a": [', "{", '{"a": {', '{"a": 1, "b": ['])
def test_a_truncated_line_is_an_error_of_its_row(line: str, tmp_path: Path) -> None:
    assert len(errors_of(write(tmp_path / "rows.jsonl", f"{LINES}{line}\n{LINES}"))) == 1


def test_rows_that_are_lists_are_row_errors_line_by_line(tmp_path: Path) -> None:
    errors = errors_of(write(tmp_path / "rows.jsonl", '[{"role": "user"}]\n[7]\n'))
    assert [error.partition(":")[0] for error in errors] == ["wrong type"] * 2


def test_an_object_longer_than_the_examined_lines(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} " + "word " * 300, "output": "o"} for number in range(1_500)]
    path = write(tmp_path / "rows.jsonl", json.dumps({"data": rows}, indent=1))
    assert path.stat().st_size > 2 << 20
    assert rows_of(path) == rows
