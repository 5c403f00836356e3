"""Rows of the bench in old and new columns, their ids, and files of responses."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from bench_runs import ROOT, bench_row, rubric, write_lines
from external_data import ABSENT, FOLDER

from train.errors import UserError
from train.multifaceted.bench.rows import NOT_STATED, read_bench, read_responses
from train.recipe import Source

PUBLISHED = FOLDER / "janus"


def read(path: Path, limit: int | None = None):
    return read_bench([Source(path=str(path))], limit)


def old(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    names = {"system": "system_prompt", "prompt": "user_prompt", "rubrics": "rubric", "preference_set": "preference"}
    names["source"] = "main_source"
    return {names.get(name, name): value for name, value in row.items()} | more


def test_old_and_new_columns_give_the_same_rows(tmp_path: Path) -> None:
    rows = [bench_row(number) for number in range(3)]
    new = read(write_lines(tmp_path / "new.jsonl", rows)).rows
    older = read(write_lines(tmp_path / "old.jsonl", [old(row) for row in rows])).rows
    assert [row.id for row in new] == [row.id for row in older]
    for newer, other in zip(new, older, strict=True):
        assert (newer.source, newer.system, newer.prompt, newer.reference) == (
            other.source,
            other.system,
            other.prompt,
            other.reference,
        )
        assert newer.rubrics == other.rubrics
    first = new[0].rubrics[2]
    assert (first.criteria, first.dimension, first.subdimension) == (
        "Is criterion 0.2 met?",
        "informativeness",
        "sub_2",
    )
    assert first.descriptions == tuple(f"grade {grade} of rubric 0.2" for grade in range(1, 6))


def test_every_file_format_of_training_is_read(tmp_path: Path) -> None:
    rows = [bench_row(number) for number in range(3)]
    wanted = [(row.id, row.rubrics) for row in read(write_lines(tmp_path / "rows.jsonl", rows)).rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    cells = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]
    datasets.Dataset.from_list(cells).to_csv(tmp_path / "rows.csv")
    for name in ("rows.json", "data.json", "rows.parquet", "saved", "rows.csv"):
        assert [(row.id, row.rubrics) for row in read(tmp_path / name).rows] == wanted, name


def test_a_json_object_that_is_one_row_is_read_as_a_row(tmp_path: Path) -> None:
    row = bench_row(0)
    del row["preference_set"]  # what is left has one list only: the rubrics
    (tmp_path / "row.json").write_text(json.dumps(row))
    (result,) = read(tmp_path / "row.json").rows
    assert result.prompt == "Question 0, is it?"
    assert {rubric.dimension for rubric in result.rubrics} == {None}


def test_ids_of_an_object_of_rows_are_text(tmp_path: Path) -> None:
    rows = {"468": old(bench_row(0), id=468), "7": old(bench_row(1))}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [row.id for row in read(tmp_path / "rows.json").rows] == ["468", "7"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=ABSENT)
def test_the_published_rows() -> None:
    (new,) = read(PUBLISHED / "bench_row.json").rows
    assert new.source == "Alpha-nlg (art)"
    assert len(new.rubrics) == 4
    (older,) = read(PUBLISHED / "bench_row_old_schema.json").rows
    assert older.id == "468"
    assert [rubric.dimension for rubric in older.rubrics] == [
        "style",
        "background_knowledge",
        "informativeness",
        "harmlessness",
    ]
    assert older.rubrics[0].subdimension == "clarity"


def test_a_generated_id_depends_only_on_the_row(tmp_path: Path) -> None:
    rows = [bench_row(number) for number in range(4)]
    ids = {row.prompt: row.id for row in read(write_lines(tmp_path / "a.jsonl", rows)).rows}
    assert len(set(ids.values())) == 4
    turned = read(write_lines(tmp_path / "b.jsonl", rows[::-1]), limit=2)
    assert (len(turned.rows), turned.rows_in_data) == (2, 4)
    assert all(ids[row.prompt] == row.id for row in turned.rows)
    twice = read(write_lines(tmp_path / "c.jsonl", [rows[0], rows[0]])).rows
    assert [row.id for row in twice] == [ids[rows[0]["prompt"]], f"{ids[rows[0]['prompt']]}-2"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prompt": None}, "there is no `prompt` or `instruction` or `user_prompt`"),
        ({"prompt": "  "}, "`prompt` is empty"),
        ({"reference_answer": 3}, "`reference_answer` is of type int"),
        ({"rubrics": []}, "`rubrics` is an empty list"),
        ({"rubrics": "no JSON"}, "`rubrics`: Expecting value"),
        ({"rubrics": [{"criteria": "c", "score_descriptions": {"1": "a"}}] * 4}, "rubric 1 has no text for each score from 1 to 5"),
        ({"rubrics": [{"score_descriptions": {}}] * 4}, "rubric 1 has no `criteria`"),
        ({"rubrics": bench_row(0)["rubrics"][:3]}, "there are 3 rubrics and 4 preferences"),
        ({"prompt": "\ud83d"}, "`prompt` holds half of a surrogate pair"),
        ({"rubrics": [rubric(1, 0) | {"criteria": "\ude00"}] * 4}, "rubric 1 holds half of a surrogate pair"),
        ({"id": 1.5}, "`id` is of type float"),
    ],
)  # fmt: skip
def test_an_invalid_row_is_named(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [bench_row(0), bench_row(1, **change)])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: ") as raised:
        read(path)
    assert error in str(raised.value)


def test_an_empty_system_message_is_allowed_and_a_missing_column_is_not(tmp_path: Path) -> None:
    rows = [bench_row(0, system=""), bench_row(1, system=None, source=None)]
    result = read(write_lines(tmp_path / "rows.jsonl", rows)).rows
    assert [row.system for row in result] == ["", ""]
    assert result[1].source == NOT_STATED
    del rows[0]["system"]
    with pytest.raises(UserError, match="there is no `system`"):
        read(write_lines(tmp_path / "rows.jsonl", rows))


def test_a_duplicate_id_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [bench_row(0, id=1), bench_row(1, id="1")])
    with pytest.raises(UserError, match="the id '1' is also that of"):
        read(path)


def test_responses_match_rows_by_id_or_by_text(tmp_path: Path) -> None:
    rows = read(write_lines(tmp_path / "rows.jsonl", [bench_row(0, id=5), bench_row(1), bench_row(2)])).rows
    given = [
        {"id": "5", "responses": ["a", "b"], "scores": [0.5, 2]},
        {"system_prompt": rows[1].system, "user_prompt": rows[1].prompt, "response": "c"},
        {"id": "unknown", "response": "d"},
    ]
    result, unmatched = read_responses(str(write_lines(tmp_path / "answers.jsonl", given)), rows)
    assert unmatched == 1
    assert set(result) == {"5", rows[1].id}
    assert (result["5"].texts, result["5"].scores) == (("a", "b"), (0.5, 2.0))
    assert result[rows[1].id].texts == ("c",)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([{"id": 1, "response": "\ud83d"}], "the response holds half"),
        ([{"id": 1}], "there is no text in `response`"),
        ([{"id": 1, "responses": ["a", None]}], "nor a list of texts"),
        ([{"response": "a"}], "there is no `system`"),
        ([{"id": 1, "response": "a"}, {"id": "1", "response": "b"}], "an earlier line has responses to row"),
        ([{"id": 2, "response": "a"}], "no line belongs to a row of the data, whose first id is '1'"),
        ([{"id": 1, "responses": ["a"], "scores": [1, 2]}], "a number for each"),
    ],
)
def test_invalid_responses_are_errors(tmp_path: Path, lines: list[dict[str, Any]], error: str) -> None:
    rows = read(write_lines(tmp_path / "rows.jsonl", [bench_row(0, id=1)])).rows
    with pytest.raises(UserError, match=error):
        read_responses(str(write_lines(tmp_path / "answers.jsonl", lines)), rows)


def test_our_own_rows_are_valid() -> None:
    rows = read(ROOT / "recipes" / "smollm2-135m" / "data" / "bench.jsonl").rows
    assert len(rows) == 6
    assert all([rubric.dimension for rubric in row.rubrics] == ["style", "background_knowledge", "informativeness", "harmlessness"] for row in rows)  # fmt: skip
