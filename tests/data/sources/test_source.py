"""Sources: every kind of file gives back the rows that were written; a broken one names the position and the error."""

import csv
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from external_data import FOLDER

from train.data.sources.formats import ROW_ERROR_KINDS, RowError, convert, detect
from train.data.sources.source import BadRows, open_source, read_rows
from train.errors import UserError
from train.recipe import Source
from train.storage.checksum import hash_files

ROOT = Path(__file__).parents[3]

ROWS = [
    {"system": "Answer in verse. 🜲𝕊", "prompt": "Why is the sky blue?", "output": "Light scatters,\nblue the most."},
    {"system": "", "prompt": 'He said "hi",\r\nthen left.', "output": "나는 짧게 답한다. 🌌"},
    {"system": "Be brief.", "prompt": "NA", "output": "42"},
]
WEATHER = {"function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}}}
SEARCH = {"function": {"name": "search", "arguments": {"words": ["a", "b"]}}}
TOOL_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "content": "a"},
        ]
    }
    for call in (WEATHER, SEARCH)
]


def pair(question: str = "q", answer: str = "a", system: str = "s") -> dict[str, Any]:
    return {"system": system, "prompt": question, "output": answer}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, content: bytes) -> Path:
    """Write `content` to `path`, compressed as its extension says."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.output_stream(str(path), compression=compression) as stream:
        stream.write(content)
    return path


def table(rows: list[dict[str, str]], delimiter: str, tmp_path: Path) -> bytes:
    path = tmp_path / "table"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


def parquet(rows: list[dict[str, Any]], tmp_path: Path) -> bytes:
    path = tmp_path / "rows"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


FILES: dict[str, Callable[[Path], bytes]] = {
    "rows.jsonl": lambda _: lines(ROWS),
    "rows.ndjson": lambda _: lines(ROWS),
    "rows.json": lambda _: json.dumps(ROWS, indent=2).encode(),
    "object.json": lambda _: json.dumps({"version": 1, "data": ROWS}).encode(),
    "by_id.json": lambda _: json.dumps({str(number): row for number, row in enumerate(ROWS)}).encode(),
    "lines.json": lambda _: lines(ROWS),
    "rows.csv": lambda tmp_path: table(ROWS, ",", tmp_path),
    "rows.tsv": lambda tmp_path: table(ROWS, "\t", tmp_path),
    "rows.parquet": lambda tmp_path: parquet(ROWS, tmp_path),
}


def rows_of(path: Path | str, allow_pickle: bool = False, **keys: Any) -> list[Any]:
    return [row for _, row in read_rows(Source(path=str(path), **keys), allow_pickle)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_back_what_was_written(name: str, compression: str, tmp_path: Path) -> None:
    path = write(tmp_path / (name + compression), FILES[name](tmp_path))
    assert rows_of(path) == ROWS


def test_windows_line_ends_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n\r\n")
    for name in ("rows.jsonl", "rows.json"):
        placed = list(read_rows(Source(path=str(write(tmp_path / name, text)))))
        assert [row for _, row in placed] == ROWS
        assert [place.rpartition(":")[2] for place, _ in placed] == ["1", "3", "5"]
    text = b"\xef\xbb\xbf" + table([pair("a"), pair("b")], ",", tmp_path)
    assert rows_of(write(tmp_path / "rows.csv", text)) == [pair("a"), pair("b")]


def test_a_line_separator_within_a_text_ends_no_row(tmp_path: Path) -> None:
    rows = [pair("one\u2028two\u0085three\x0bfour")]
    assert rows_of(write(tmp_path / "rows.jsonl", lines(rows))) == rows


def test_places_count_lines_and_rows_from_one(tmp_path: Path) -> None:
    def places(path: Path) -> list[str]:
        return [place.removeprefix(str(path)) for place, _ in read_rows(Source(path=str(path)))]

    assert places(write(tmp_path / "rows.jsonl", b"\n" + lines(ROWS))) == [":2", ":3", ":4"]
    assert places(write(tmp_path / "rows.csv", FILES["rows.csv"](tmp_path))) == [":2", ":4", ":6"]
    assert places(write(tmp_path / "rows.json", FILES["rows.json"](tmp_path))) == [" row 1", " row 2", " row 3"]
    assert places(write(tmp_path / "rows.parquet", parquet(ROWS, tmp_path))) == [" row 1", " row 2", " row 3"]


def test_tool_arguments_get_no_keys_of_other_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", lines(TOOL_ROWS))
    assert rows_of(tmp_path / "rows.jsonl") == TOOL_ROWS
    write(tmp_path / "rows.parquet", parquet(TOOL_ROWS, tmp_path))
    weather, search = (row["messages"][1]["tool_calls"][0] for row in rows_of(tmp_path / "rows.parquet"))
    assert weather == {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}  # a struct can't keep a null
    assert search == SEARCH
    saved = datasets.Dataset.from_list(TOOL_ROWS, on_mixed_types="use_json")
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(tmp_path / "json.parquet")
    assert rows_of(tmp_path / "saved") == TOOL_ROWS
    assert rows_of(tmp_path / "json.parquet") == TOOL_ROWS


def test_a_folder_written_by_save_to_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    assert rows_of(tmp_path / "one") == ROWS
    dataset.select([2, 0]).save_to_disk(str(tmp_path / "chosen"))
    assert rows_of(tmp_path / "chosen") == [ROWS[2], ROWS[0]]
    datasets.DatasetDict(train=dataset.select([0]), extra=dataset.select([1, 2])).save_to_disk(str(tmp_path / "two"))
    assert rows_of(tmp_path / "two") == ROWS[:1]
    placed = list(read_rows(Source(path=str(tmp_path / "two"), split="extra")))
    assert placed == [(f"{tmp_path}/two[extra] row 1", ROWS[1]), (f"{tmp_path}/two[extra] row 2", ROWS[2])]


def test_a_folder_gives_all_files_or_those_of_the_split(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "b.jsonl", lines(ROWS[1:]))
    write(tmp_path / "plain" / "a.json.gz", json.dumps(ROWS[:1]).encode())
    write(tmp_path / "plain" / "README.md", b"# Rows")
    write(tmp_path / "plain" / ".cache" / "c.jsonl", lines(ROWS))
    assert rows_of(tmp_path / "plain") == ROWS
    write(tmp_path / "split" / "data" / "train-00000-of-00001.parquet", parquet(ROWS[:2], tmp_path))
    write(tmp_path / "split" / "data" / "test-00000-of-00001.parquet", parquet(ROWS[2:], tmp_path))
    write(tmp_path / "split" / "dev" / "rows.jsonl", lines(ROWS[1:2]))
    assert rows_of(tmp_path / "split") == ROWS[:2]
    assert rows_of(tmp_path / "split", split="test") == ROWS[2:]
    assert rows_of(tmp_path / "split", split="validation") == ROWS[1:2]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (("data/train_sft-00000-of-00001", "data/train_gen-00000-of-00001", "data/test_sft-0"), "train_sft", [0]),
        (("data/train_sft-00000-of-00001", "data/train_gen-00000-of-00001", "data/test_sft-0"), "train_gen", [1]),
        (("data/train_sft-00000-of-00001", "data/train_gen-00000-of-00001", "data/test_sft-0"), "test", [2]),
        (("train_sft-00000-of-00002-0123456789abcdef", "train_sft-00001-of-00002-fedcba9876543210"), "train", [0, 1]),
        (("train_sft/part-0", "train_sft/part-1", "train_gen/part-0"), "train_sft", [0, 1]),
        (("val_sft", "val_gen"), "validation_gen", [1]),
        (("train-sft", "train-gen"), "train_sft", [0]),
        (("TRAIN_SFT_1", "Train_sft_2", "train_gen_1"), "train_SFT", [0, 1]),
        (("training_1", "train.part2", "train3"), "train", [0, 1, 2]),
        (("math_train", "code_train_01"), "train", [0, 1]),
        (("math_train", "code_train"), "math_train", [0]),
        (("train/sft", "train/gen"), "train", [0, 1]),
    ],
)
def test_a_split_takes_its_own_files_alone(
    names: tuple[str, ...], split: str, chosen: list[int], tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.jsonl", lines([{"prompt": str(number), "output": "o"}]))
    assert sorted(row["prompt"] for row in rows_of(tmp_path, split=split)) == list(map(str, chosen))


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("data/train_sft-00000-of-00001", "data/train_gen-00000-of-00001"), "`train_gen` or `train_sft`"),
        (("train", "train_extra"), "`train` or `train_extra`"),
        (("train_v1", "train_v2"), "`train_v1` or `train_v2`"),
        (("train_sft/a", "train_gen/a"), "`train_gen` or `train_sft`"),
    ],
)
def test_two_kinds_of_one_split_are_not_mixed_silently(names: tuple[str, ...], kinds: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / f"{name}.jsonl", lines(ROWS))
    error = error_of(tmp_path)
    assert f"by the names of the files, the split `train` could be {kinds}." in error
    assert "`split: train_" in error
    assert "a file or a glob" in error


def test_a_slice_of_a_split_is_refused_for_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    for split in ("train[:2]", "train+test"):
        assert f"no files of the split `{split}`. The splits in the names are: train." in error_of(
            tmp_path, split=split
        )


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "a.jsonl", lines(ROWS))
    for skipped_files in ("more.jsonl.bz2", "notes.txt", "old/b.jsonl.bak", "_half/c.jsonl"):
        write(folder / skipped_files, b"x")
    for companion in ("README.md", "LICENSE", ".hidden", ".cache/d.jsonl"):
        write(folder / companion, b"x")
    opened = open_source(Source(path=str(folder)))
    assert opened.files == [str(folder / "a.jsonl")]
    skipped = [str(path.relative_to(folder)) for path in opened.skipped_files]
    assert sorted(skipped) == ["_half/c.jsonl", "more.jsonl.bz2", "notes.txt", "old/b.jsonl.bak"]
    assert open_source(Source(path=str(folder / "a.jsonl"))).skipped_files == []


def test_a_glob_gives_its_matches_in_order(tmp_path: Path) -> None:
    write(tmp_path / "x" / "2.jsonl", lines(ROWS[1:]))
    write(tmp_path / "1.jsonl.zst", lines(ROWS[:1]))
    assert rows_of(f"{tmp_path}/**/*.jsonl*") == ROWS


PIRATE = "Always talk like a pirate, please."


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("system_prompt", PIRATE, PIRATE),
        ("system", "Brief.", "Brief."),
        ("tools", {"name": "weather"}, "weather"),
        ("preamble", {"de": "Antworte immer auf Deutsch."}, "Antworte immer auf Deutsch."),
        ("指示", "日本語で答えてください。", "日本語で答えてください。"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "pkl"])
def test_content_beside_the_rows_of_a_document_is_an_error(
    key: str, value: Any, text: str, ending: str, tmp_path: Path
) -> None:
    document = {key: value, "version": "1.0", "data": ROWS}
    content = pickle.dumps(document) if ending == "pkl" else json.dumps(document).encode()
    path = write(tmp_path / f"rows.{ending}", content)
    with pytest.raises(UserError) as caught:
        list(read_rows(Source(path=str(path)), allow_pickle=True))
    error = str(caught.value)
    assert error.startswith(f"{path}: `{key}` beside the rows (`data`) holds content that no row has")
    assert json.dumps(text, ensure_ascii=False) in error
    assert "Put it into the rows, or remove it from the file." in error


@pytest.mark.parametrize(
    "beside",
    [
        {"version": "1.0", "count": 3, "license": "CC BY 4.0, see the file beside this one"},
        {"description": "Questions about spiders, written by hand.", "citation": "@misc{a, title = {All of it}}"},
        {"info": {"description": "Questions about spiders.", "year": 2024}, "created": "on a day in May"},
        {"system": "", "system_prompt": None, "tools": {}},
    ],
)
def test_a_document_may_have_metadata_beside_its_rows(beside: dict[str, Any], tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "rows.json", json.dumps({**beside, "rows": ROWS}).encode())) == ROWS


@pytest.mark.parametrize("ending", ["pkl", "pickle", "bin", "joblib", "pt", "pth", "pkl.gz"])
def test_pickles_are_refused_until_the_recipe_allows_them(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending in ("pt", "pth"):
        torch.save(ROWS, path)
    else:
        write(path, pickle.dumps(ROWS))
    with pytest.raises(UserError, match=r"data\.allow_pickle: true") as caught:
        rows_of(path)
    assert str(path) in str(caught.value)
    assert rows_of(path, allow_pickle=True) == ROWS


def test_a_refused_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    write(tmp_path / "folder" / "rows.pkl", pickle.dumps(Trap()))
    for path in (tmp_path / "folder", tmp_path / "folder" / "rows.pkl", tmp_path / "folder" / "*"):
        with pytest.raises(UserError, match="allow_pickle"):
            rows_of(path)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_data_frame(tmp_path: Path) -> None:
    pandas.DataFrame([*ROWS, {"prompt": "p", "output": "o"}]).to_pickle(tmp_path / "rows.pkl")
    assert rows_of(tmp_path / "rows.pkl", allow_pickle=True) == [*ROWS, {"system": None, "prompt": "p", "output": "o"}]


REAL = {"biggen_bench": 765, "persona_chat_valid": 997, "tau_airline_tools": 200, "mt_bench_101": 1388}


def conversations_of(path: Path) -> list[list[dict[str, Any]]]:
    rows = rows_of(path)
    return [convert(row, detect(rows[0]))[0] for row in rows]


@pytest.mark.parametrize("name", REAL)
def test_published_conversations(name: str) -> None:
    path = FOLDER / "conversations" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert len(conversations_of(path)) == REAL[name]


def test_our_own_conversations() -> None:
    path = ROOT / "recipes" / "smollm2-135m" / "data" / "train.jsonl"
    conversations = conversations_of(path)
    assert len(conversations) == len(path.read_text(encoding="utf-8").splitlines())
    assert {messages[0]["role"] for messages in conversations} == {"system", "user"}
    assert {messages[-1]["role"] for messages in conversations} == {"assistant"}


def broken_rows(tmp_path: Path) -> Path:
    bad = [
        b'{"system": "s", "prompt": "p"',
        b'{"system": "s", "prompt": "p", "output": "\xff"}',
        b'"a text"',
        b'{"system": "s", "prompt": "p"}',
        b'{"prompt": "p", "output": ""}',
    ]
    return write(
        tmp_path / "rows.jsonl", lines([pair("one")]) + b"\n".join(bad + [bad[0]] * 4) + b"\n" + lines([pair("two")])
    )


def test_bad_rows_are_one_error_with_kinds_counts_and_places(tmp_path: Path, load: Callable[..., Any]) -> None:
    path = broken_rows(tmp_path)
    with pytest.raises(UserError) as caught:
        load(path)
    error = str(caught.value)
    assert "data.on_bad_row: skip" in error
    assert f"5 invalid JSON: {path}:2: Expecting ',' delimiter at column 30" in error
    assert [f"{path}:{line}:" in error for line in range(1, 12)] == [False, *[True] * 7, False, False, False]
    assert "1 not UTF-8: " in error
    assert "0xff" in error
    assert "\n" not in error


def test_skipping_bad_rows_keeps_the_count(tmp_path: Path, load: Callable[..., Any]) -> None:
    path = broken_rows(tmp_path)
    loaded = load(path, on_bad_row="skip")
    assert [row.messages[1]["content"] for row in loaded.train if len(row.messages) == 3] == ["one", "two"]
    counts = {kind: rows.count for kind, rows in loaded.errors.items()}
    assert counts == {"invalid JSON": 5, "not UTF-8": 1, "wrong type": 1, "missing column": 1, "empty content": 1}
    examples = loaded.errors["invalid JSON"].examples
    assert [example.place for example in examples] == [f"{path}:{line}" for line in (2, 7, 8)]
    assert str(examples[0]).startswith(f"{path}:2: ")
    assert set(counts) <= set(ROW_ERROR_KINDS)


def test_only_the_first_three_of_a_kind_are_kept() -> None:
    rows = BadRows()
    for number in range(5):
        rows.add(f"place {number}", "detail")
    assert (rows.count, [example.place for example in rows.examples]) == (5, ["place 0", "place 1", "place 2"])


def chain(count: int) -> bytes:
    return b'{"prompt": ' + b"[" * count + b"]" * count + b"}"


GOOD = lines([pair("good")])
HEADER = b"system,prompt,output\n"

# name of the file: (its bytes, what the error must say; {path} stands for the file)
BROKEN: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["{path}: the file holds no rows"]),
    "empty.csv": (b"", ["{path}: the file holds no rows"]),
    "empty.json": (b"", ["{path}: the file holds no rows"]),
    "empty.parquet": (b"", ["{path}: the file holds no rows"]),
    "blank.jsonl.gz": (b"\n \n", ["{path}: the file holds no rows"]),
    "header.csv": (HEADER, ["{path}: the file holds no rows"]),
    "none.json": (b"[]", ["{path}: the file holds no rows"]),
    "cut.jsonl": (GOOD + GOOD[:-9], ["invalid JSON: {path}:2:", "column"]),
    "deep.jsonl": (GOOD + chain(200_000), ["invalid JSON: {path}:2:", "recursion"]),
    "digits.jsonl": (GOOD + b'{"prompt": ' + b"9" * 5_000 + b"}", ["invalid JSON: {path}:2:", "4300 digits"]),
    "latin1.jsonl": (GOOD + '{"prompt": "é"}'.encode("latin-1"), ["not UTF-8: {path}:2:", "0xe9"]),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), ["{path}: the file is UTF-16 text", "FF FE"]),
    "surrogate.jsonl": (GOOD + lines([pair("x")]).replace(b'"x"', b'"\\ud83d"'), ["not UTF-8: {path}:2:", "\\ud83d"]),
    "cut.json": (b'[{"prompt": "p",\n "output": "o"}', ["{path}:2: invalid JSON", "column"]),
    "latin1.json": ('[\n{"prompt": "é"}]'.encode("latin-1"), ["{path}:2: not UTF-8", "0xe9"]),
    "lists.json": (b'{"train": [{}], "test": [{}]}', ["{path}: the file must be a list of rows", "train, test"]),
    "number.json": (b"7", ["{path}: the file must be a list of rows", "int"]),
    "mixed.json": (b'[{"prompt": "p", "output": "o"}, 7]', ["wrong type: {path} row 2:"]),
    "text.parquet": (GOOD, ["{path}: can't be read", "Parquet magic bytes"]),
    "text.parquet.gz": (GOOD, ["{path}: can't be read", "Parquet magic bytes"]),
    "quotes.csv": (HEADER + b's,p,o\ns,"p,o\n', ["invalid CSV: {path}:3:", "unexpected end of data"]),
    "cells.csv": (HEADER + b"s,p,o\n\ns,p\n", ["invalid CSV: {path}:4: 2 cells where the header names 3"]),
    "many_cells.tsv": (b"prompt\toutput\np\to\np\to\tx\n", ["invalid CSV: {path}:3: 3 cells"]),
    "latin1.csv": (HEADER + b's,p,o\ns,"p\n\xe9",o\n', ["not UTF-8: {path}:3: line 4"]),
    "twice.csv": (b"prompt,output,prompt\np,o,p\n", ["{path}:1: two columns", "have the same name"]),
    "no_header.csv": (b"s,p,o\ns,p,o\n", ["{path}:2: no known format has these columns: `s`, `p`, `o`", "janus"]),
    "preferences.jsonl": (lines([{"prompt": "p", "chosen": "c"}]), ["{path}:1: no known format", "`prompt`, `chosen`"]),
    "rows.txt": (
        GOOD,
        ["{path}: the file extension `.txt` is not supported", ".jsonl, .ndjson, .json, .parquet, .csv, .tsv"],
    ),
    "rows": (GOOD, ["{path}: the file extension `` is not supported"]),
    "roles.jsonl": (
        GOOD.replace(b"good", b"x") + lines([{"messages": []}]),
        ["missing column: {path}:2: no `prompt` among the columns `messages`"],
    ),
    "system_only.jsonl": (
        lines([{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}]),
        ["no row of", "no assistant turn: {path}:1: the roles are: system, user"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_where_and_what(
    name: str, tmp_path: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    content, words = BROKEN[name]
    path = write(tmp_path / name, content)
    message = refused("--recipe", recipe_file(data={"sources": [{"path": str(path)}]}))
    assert [word for word in words if word.format(path=path) not in message] == []


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.csv.gz", "rows.parquet"])
def test_a_file_that_was_cut_off_is_an_error_not_fewer_rows(name: str, tmp_path: Path) -> None:
    rows = [pair(f"question {row * 7919 % 1009}", f"answer {row * 104729 % 1013}") for row in range(2000)]
    kind = name.split(".")[1]
    content = {"jsonl": lines(rows), "csv": table(rows, ",", tmp_path), "parquet": parquet(rows, tmp_path)}[kind]
    path = write(tmp_path / name, content)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="can't be read") as caught:
        rows_of(path)
    assert str(path) in str(caught.value)


def error_of(path: Path | str, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **keys)
    return str(caught.value)


def test_a_path_that_is_not_there_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data" / "conversations.jsonl", GOOD)
    error = error_of(tmp_path / "data" / "conversation.jsonl")
    assert f"Did you mean {tmp_path}/data/conversations.jsonl?" in error
    assert f"Did you mean {tmp_path}/data/conversations.jsonl?" in error_of(tmp_path / "dato" / "conversations.jsonl")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean data/conversations.jsonl?" in error_of("daat/conversations.jsonl")
    assert f"no file matches this pattern in {tmp_path}" in error_of("data/*.parquet")


def test_an_unavailable_hub_id_is_an_error_with_its_request() -> None:
    error = error_of("nobody/no-such-data", name="small", split="test", revision="v1")
    for word in ("nobody/no-such-data", "split `test`", "configuration `small`", "revision `v1`", "hf auth login"):
        assert word in error
    assert "\n" not in error


def test_a_hub_data_set_is_requested_with_the_keys_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, **keys: Any) -> datasets.Dataset:  # no hub can be reached from here
        asked.append((names, keys))
        return datasets.Dataset.from_list(TOOL_ROWS, on_mixed_types="use_json")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="kaist-ai/Some-Collection", name="small", split="train[:2]", revision="v1")
    name = "kaist-ai/Some-Collection:small[train[:2]]"
    assert list(read_rows(source)) == [(f"{name} row 1", TOOL_ROWS[0]), (f"{name} row 2", TOOL_ROWS[1])]
    assert asked == [((source.path, "small"), {"split": "train[:2]", "revision": "v1"})]


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    datasets.Dataset.from_list([pair()]).save_to_disk(str(tmp_path / "saved"))
    for key in ("name", "revision", "split"):
        assert f"`{key}: other` has no meaning" in error_of(path, **{key: "other"})
        assert f"`{key}: other` has no meaning" in error_of(tmp_path / "saved", **{key: "other"})


def test_folders_without_files_of_the_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no data file in this folder" in error_of(tmp_path / "empty")
    write(tmp_path / "half" / "train.jsonl", GOOD)
    write(tmp_path / "half" / "held_out.jsonl", GOOD)
    assert "is held_out.jsonl part of the split `train`?" in error_of(tmp_path / "half")
    write(tmp_path / "test" / "test.jsonl", GOOD)
    assert "no files of the split `train`. The splits in the names are: test" in error_of(tmp_path / "test")
    datasets.DatasetDict(train=datasets.Dataset.from_list([pair()])).save_to_disk(str(tmp_path / "saved"))
    assert "no split `test`. It has: train" in error_of(tmp_path / "saved", split="test")
    (tmp_path / "saved" / "train" / "state.json").unlink()
    assert "can't be opened" in error_of(tmp_path / "saved")


def test_a_pickle_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.pkl", GOOD)
    with pytest.raises(UserError, match="the pickle can't be opened"):
        rows_of(path, allow_pickle=True)


def test_row_errors_are_values_until_the_row_is_used(tmp_path: Path) -> None:
    rows = rows_of(broken_rows(tmp_path))
    assert [isinstance(row, RowError) for row in rows[:5]] == [False, True, True, True, False]


def test_the_digest_depends_on_every_byte_and_on_no_name(tmp_path: Path) -> None:
    def digest(path: Path, **keys: Any) -> str:
        return open_source(Source(path=str(path), **keys)).digest()

    first, second = write(tmp_path / "a" / "train.jsonl", GOOD), write(tmp_path / "b" / "train.jsonl", GOOD)
    assert digest(first) == digest(second) == digest(tmp_path / "a")
    assert digest(first) != digest(write(tmp_path / "c.jsonl", GOOD.replace(b"good", b"goof")))
    assert digest(first) != digest(write(tmp_path / "d.json", GOOD))  # another reader
    write(tmp_path / "a" / "train-2.jsonl", GOOD)
    write(tmp_path / "b" / "train-2.jsonl", GOOD + GOOD)
    assert len({digest(tmp_path / "a"), digest(tmp_path / "b"), digest(first)}) == 3
    assert hash_files([first, second]) != hash_files([write(tmp_path / "e", GOOD * 2)])
    datasets.Dataset.from_list([pair("x")]).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list([pair("y")]).save_to_disk(str(tmp_path / "other"))
    assert digest(tmp_path / "saved") == digest(tmp_path / "saved") != digest(tmp_path / "other")


def test_chunks_are_the_same_each_time_and_small(tmp_path: Path) -> None:
    rows = [pair(f"question {row}", "answer " * (row % 90)) for row in range(3_000)]
    contents = {"jsonl": lines(rows), "csv": table(rows, ",", tmp_path), "parquet": parquet(rows, tmp_path)}
    contents["json"] = json.dumps(rows).encode()
    for kind, content in contents.items():
        opened = open_source(Source(path=str(write(tmp_path / f"rows.{kind}", content))))
        chunks = [pickle.loads(pickle.dumps(chunk)) for _, chunk in opened.chunks()]  # they travel between processes
        again = [chunk for _, chunk in opened.chunks()]
        assert [list(chunk.rows()) for chunk in chunks] == [list(chunk.rows()) for chunk in again]
        assert [row for chunk in chunks for _, row in chunk.rows()] == rows
        assert len(chunks) > 1


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", GOOD)
    write(tmp_path / "folder" / "a.jsonl", GOOD)
    (tmp_path / "folder" / "more").symlink_to(tmp_path / "elsewhere")
    assert rows_of(tmp_path / "folder") == [pair("good")] * 2
