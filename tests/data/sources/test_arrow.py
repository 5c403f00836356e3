"""Columns of Parquet and saved data sets: only texts and numbers are converted, and no conversion fails."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from train.data.sources.arrow import ArrowRows, ArrowValue
from train.data.sources.formats import RowError, convert, detect
from train.data.sources.source import read_conversations, read_rows
from train.errors import UserError
from train.recipe import Source

NEVER = 253_402_300_799_000_000  # 9999-12-31 23:59:59 UTC in microseconds: in Berlin that is the year 10000
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def timestamps(zone: str | None, value: int = NEVER) -> pyarrow.Array:
    return pyarrow.array([value, None], pyarrow.timestamp("us", tz=zone))


def utf8(content: bytes) -> pyarrow.Array:
    """Return a text column with one value of these bytes, unchecked."""
    ends = pyarrow.array([0, len(content)], pyarrow.int32()).buffers()[1]
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, ends, pyarrow.py_buffer(content)])


def values(column: pyarrow.Array) -> list[Any]:
    batch = pyarrow.RecordBatch.from_arrays([column], ["column"])
    return [row["column"] for _, row in ArrowRows(1, batch).rows()]


NO_TEXT = {
    "a date": pyarrow.array([3_000_000, None], pyarrow.date32()),
    "a timestamp": timestamps("Europe/Berlin"),
    "a zone that is not installed": timestamps("Mars/Olympus_Mons", 0),
    "a duration": pyarrow.array([2**62, None], pyarrow.duration("s")),
    "an interval": pyarrow.array([(1, 2, 3), None], pyarrow.month_day_nano_interval()),
    "a time": pyarrow.array([datetime.time(1), None], pyarrow.time64("ns")),
    "a decimal": pyarrow.array([decimal.Decimal("1e40"), None], pyarrow.decimal256(60, 2)),
    "bytes": pyarrow.array([b"\xff\xd8", None], pyarrow.binary()),
    "fixed bytes": pyarrow.array([b"\xff\xd8", None], pyarrow.binary(2)),
    "a uuid": pyarrow.array([b"0" * 16, None], pyarrow.uuid()),
    "dates in a list": pyarrow.array([[3_000_000], None], pyarrow.list_(pyarrow.date32())),
    "dates in a fixed list": pyarrow.array([[1, 3_000_000], None], pyarrow.list_(pyarrow.date32(), 2)),
    "a dictionary of dates": pyarrow.array([3_000_000, None], pyarrow.date32()).dictionary_encode(),
    "an embedding": pyarrow.array([[0.5] * 8, None], pyarrow.list_(pyarrow.float32())),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_column_without_text_is_not_converted(name: str) -> None:
    column = NO_TEXT[name]
    assert values(column) == [ArrowValue(str(column.type)), None]
    assert str(values(column)[0]) == str(column.type)


TEXTS = ["one", None, "två 🜲"]
HOLD_TEXT = {
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
    "view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "runs": pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([1, 2, 3], pyarrow.int32()), pyarrow.array(TEXTS)),
    "opaque": pyarrow.ExtensionArray.from_storage(pyarrow.opaque(pyarrow.string(), "t", "v"), pyarrow.array(TEXTS)),
}


@pytest.mark.parametrize("name", HOLD_TEXT)
def test_texts_are_texts_however_arrow_stores_them(name: str) -> None:
    assert values(HOLD_TEXT[name]) == TEXTS


def test_numbers_are_converted() -> None:
    for numbers, kind in (([1, None], "uint64"), ([0.5, None], "float16"), ([True, None], "bool"), ([None], "null")):
        assert values(pyarrow.array(numbers, kind)) == numbers


def test_a_text_in_a_nested_column_is_read_whatever_is_beside_it() -> None:
    never = pyarrow.scalar(NEVER, pyarrow.timestamp("us", tz="Europe/Berlin"))
    turn = pyarrow.struct([("role", "string"), ("content", "string"), ("time", never.type), ("score", "float64")])
    turns = [[{**MESSAGES[0], "time": NEVER, "score": 0.5}, MESSAGES[1]], None, []]
    for kind in (pyarrow.list_(turn), pyarrow.large_list(turn), pyarrow.list_view(turn)):
        first, *others = values(pyarrow.array(turns, kind))
        assert first == [{**MESSAGES[0], "time": ArrowValue(str(never.type)), "score": 0.5}, MESSAGES[1]]
        assert others == [None, []]
        assert convert({"messages": first}, "messages")[0] == MESSAGES
    facts = pyarrow.array([[("a", NEVER)], None], pyarrow.map_(pyarrow.string(), never.type))
    assert values(facts) == [{"a": ArrowValue(str(never.type))}, None]
    either = pyarrow.UnionArray.from_dense(
        pyarrow.array([0, 1], pyarrow.int8()),
        pyarrow.array([0, 0], pyarrow.int32()),
        [pyarrow.array(["x"]), timestamps("UTC")],
    )
    assert values(either) == ["x", ArrowValue(str(timestamps("UTC").type))]
    twice = pyarrow.StructArray.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], ["key", "key"])
    assert values(twice) == [ArrowValue(str(twice.type))]


def test_bytes_of_images_are_not_copied(tmp_path: Path) -> None:
    image = {"bytes": b"\x89PNG" * 1_000, "path": "a.png"}
    rows = [{"messages": MESSAGES, "image": image, "images": [image]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    ((_, row),) = read_rows(Source(path=str(tmp_path / "rows.parquet")))
    assert row["image"] == {"bytes": ArrowValue("binary"), "path": "a.png"}
    assert row["images"] == [row["image"]]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "image": datasets.Image(),
        }
    )
    broken = [{"messages": MESSAGES, "image": {"bytes": b"no image", "path": None}}]
    datasets.Dataset.from_list(broken, features=features).save_to_disk(str(tmp_path / "saved"))
    ((_, row),) = read_rows(Source(path=str(tmp_path / "saved")))
    assert row == {"messages": MESSAGES, "image": {"bytes": ArrowValue("binary")}}


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Mars/Olympus_Mons", None])
def test_a_conversation_beside_a_date_is_read(zone: str | None, tmp_path: Path) -> None:
    table = pyarrow.table({"messages": [MESSAGES, MESSAGES], "valid_to": timestamps(zone)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    read = list(read_conversations(Source(path=str(tmp_path / "rows.parquet"))))
    assert [conversation.messages for _, conversation in read] == [MESSAGES, MESSAGES]


def test_a_required_column_of_another_type_is_a_row_error_that_names_the_type() -> None:
    (row,) = (row for _, row in ArrowRows(1, pyarrow.RecordBatch.from_pydict({
        "prompt": timestamps("Europe/Berlin")[:1], "output": ["a"],
    })).rows())  # fmt: skip
    with pytest.raises(RowError, match=r"`prompt` .*timestamp\[us, tz=Europe/Berlin\].*it must be a text"):
        convert(row, detect(row))


@pytest.mark.parametrize(
    ("row", "type", "cast"),
    [
        ({"system": [b"Be brief."], "prompt": ["q"], "output": ["a"]}, "binary", True),
        ({"prompt": [b"q"], "output": ["a"]}, "binary", True),
        ({"messages": [[{"role": "user", "content": b"q"}, {"role": "user", "content": b"q"}]]}, "binary", True),
        ({"prompt": ["q"], "output": [datetime.date(2024, 5, 1)]}, "date32[day]", True),
        ({"messages": [[b"q", b"a"]]}, "list<item: binary>", False),
    ],
)
def test_a_value_of_another_type_is_shown_by_its_arrow_type_with_a_cast(
    row: dict[str, Any], type: str, cast: bool
) -> None:
    ((_, read),) = ArrowRows(1, pyarrow.RecordBatch.from_pydict(row)).rows()
    with pytest.raises(RowError) as caught:
        convert(read, detect(read))
    assert f"of Arrow's type {type}" in str(caught.value)
    assert "ArrowValue" not in str(caught.value)
    assert ('in pyarrow, column.cast("string") converts it to text' in str(caught.value)) is cast
    text = pyarrow.array([b"Be brief."]).cast("string")
    assert text.to_pylist() == ["Be brief."]


def test_text_that_is_not_utf8_is_an_error_of_the_rows_that_need_it() -> None:
    broken = utf8(b"caf\xe9")
    batch = pyarrow.RecordBatch.from_arrays([broken, pyarrow.array(["a"]), broken], ["prompt", "output", "beside"])
    ((_, row),) = ArrowRows(1, batch).rows()
    with pytest.raises(RowError, match=r"not UTF-8: `prompt`.*0xe9"):
        convert(row, "janus")
    assert convert({**row, "prompt": "q"}, "janus")[0] == MESSAGES


def test_json_that_does_not_parse_stays_text() -> None:
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['{"a": null}', "{half", None]))
    assert values(column) == [{"a": None}, "{half", None]


def test_two_columns_with_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, ["prompt", "output", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet: two columns have the same name: prompt, output, prompt"):
        list(read_rows(Source(path=str(tmp_path / "rows.parquet"))))
