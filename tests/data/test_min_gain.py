"""min_gain: the rows of the smallest gains are left out and counted, wherever the data has moved since."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from pydantic import ValidationError

from train.data.chat.template import use_template
from train.data.diagnostics import describe_dropped, find_data_warnings, find_dropped_rows
from train.data.prepare import examine
from train.data.prepared_data import PreparedData, Split
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import Source, load_recipe
from train.sft import main

Row = list[dict[str, str]]
Gains = Callable[..., Path]


def read(path: Path) -> list[Row]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def record(row: Row, **models: float) -> dict[str, Any]:
    """A line of gain_rows.jsonl, with the digest computed here."""
    text = "\0".join(text for turn in row for text in (turn["role"], turn["content"]))
    values = {name: {"gain": gain, "accuracy": 0.5} for name, gain in models.items()}
    return {
        "place": "moved.jsonl:1",
        "conversation": xxhash.xxh3_128(text.encode()).hexdigest(),
        "instruction": 0,
        **values,
    }


@pytest.fixture
def gains(tmp_path: Path) -> Gains:
    def write(*records: object, name: str = "gain_rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def examined(recipe_file: Callable[..., Path]) -> Callable[..., PreparedData]:
    def run(**data: Any) -> PreparedData:
        recipe = load_recipe(recipe_file(data=data))
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        return examine(recipe, tokenizer)

    return run


def numbers(split: Split | None) -> list[int]:
    """The lines of the rows that are trained."""
    assert split is not None
    places = {place for sequence in range(len(split.dataset)) for place in split.dataset.places(sequence)}
    return sorted(int(place.rpartition(":")[2]) for place in places)


def measured(path: Path) -> dict[int, dict[str, Any]]:
    """A record for each row with a system message: every third has a gain of 0 or less."""
    rows = {number: row for number, row in enumerate(read(path), 1) if row[0]["role"] == "system"}
    return {
        number: record(row, tiny=0.0 if number == 3 else 0.25 if number % 3 else -number / 8)
        for number, row in rows.items()
    }


def test_rows_without_a_gain_above_0_are_left_out_and_counted(
    gains: Gains,
    rows_file: Path,
    examined: Callable[..., PreparedData],
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = measured(rows_file)
    left_out = [number for number in records if number % 3 == 0]
    file = gains(*records.values())
    source = {"path": str(rows_file), "min_gain": str(file)}
    data = examined(sources=[source], cache_dir=str(tmp_path / "cache"))
    assert numbers(data.train) == [number for number in range(1, 25) if number not in left_out]
    assert data.train.stats.conversations == data.train.stats.rows == 24 - len(left_out)
    (dropped,) = find_dropped_rows(data, load_recipe(recipe_file()).data)
    line = f"{len(left_out)} rows left out of 24 by data.sources.0.min_gain: first {rows_file}:3: gain 0.000"
    assert describe_dropped(dropped) == line
    assert [row.place for row in dropped.examples] == [f"{rows_file}:{number}" for number in left_out[:3]]
    kept = f"data.sources.0.min_gain: {24 - len(records)} of 24 rows are not in {file} and stay"
    assert find_data_warnings(data) == [kept]

    sources = {"sources": [source], "cache_dir": str(tmp_path / "cache")}
    arguments = ["--recipe", str(recipe_file(data=sources, training={"max_steps": 1, "num_train_epochs": ...}))]
    assert main([*arguments, "--check", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [(group["outcome"], group["rows"]) for group in report["outcomes"]] == [("left out", len(left_out))]
    assert kept in report["warnings"]
    assert report["caches"][0]["hit"]  # no row was tokenized again
    assert main(arguments) == 0
    for screen in capsys.readouterr().out.split("\nready\n"):
        assert f"{len(left_out)} rows left out of 24 by" in " ".join(screen.split())
    assert examined(cache_dir=str(tmp_path / "cache")).caches[0].hit


def test_rows_are_found_in_other_files_orders_and_formats(
    gains: Gains, rows_file: Path, examined: Callable[..., PreparedData], tmp_path: Path
) -> None:
    records = measured(rows_file)
    file = gains(*records.values())
    rows = read(rows_file)[::-1]
    moved = tmp_path / "moved.jsonl"
    columns = [
        {{"user": "prompt", "assistant": "output"}.get(turn["role"], "system"): turn["content"] for turn in row}
        for row in rows
    ]
    moved.write_text("".join(json.dumps(row) + "\n" for row in columns), encoding="utf-8")
    data = examined(sources=[{"path": str(moved), "min_gain": str(file)}])
    assert numbers(data.train) == sorted(25 - number for number in range(1, 25) if number not in records or number % 3)


def test_validation_rows_are_left_out_too(gains: Gains, rows_file: Path, examined: Callable[..., PreparedData]) -> None:
    records = measured(rows_file)
    stays = [number for number in range(1, 25) if number not in records or number % 3]
    source = {"path": str(rows_file), "min_gain": str(gains(*records.values()))}
    data = examined(validation=[source])
    assert (numbers(data.train), numbers(data.validation)) == ([*range(1, 25)], stays)
    (gain_filter,) = data.gain_filters
    assert (gain_filter.key, gain_filter.rows) == ("data.validation.0.min_gain", 24)
    data = examined(sources=[source], validation=0.25)
    assert sorted(numbers(data.train) + numbers(data.validation)) == stays


def test_the_model_after_training_and_the_largest_gain_of_equal_rows_count(
    gains: Gains, rows_file: Path, examined: Callable[..., PreparedData]
) -> None:
    rows = read(rows_file)
    lines = [record(rows[0], before=-1, after=1), record(rows[1], before=1, after=-1)]
    lines += [record(rows[2], tiny=1), record(rows[2], tiny=-1), record(rows[3], tiny=-1), record(rows[3], tiny=-2)]
    lines.append(record(rows[4], tiny=math.nan))  # of a broken model; not 0 or less, so the row stays
    data = examined(sources=[{"path": str(rows_file), "min_gain": str(gains(*lines))}])
    assert numbers(data.train) == [number for number in range(1, 25) if number not in (2, 4)]


def test_a_file_that_leaves_out_nothing_is_reported(
    gains: Gains, rows_file: Path, examined: Callable[..., PreparedData]
) -> None:
    file = gains(*(record(row, tiny=1.0) for row in read(rows_file)))
    data = examined(sources=[{"path": str(rows_file), "min_gain": str(file)}])
    assert data.train.stats.rows == 24
    assert find_data_warnings(data) == ["data.sources.0.min_gain leaves out none of 24 rows"]


@pytest.mark.parametrize(
    "line",
    [
        {"place": "rows.jsonl:1", "tiny": {"gain": 0.5}},
        {"conversation": "00"},
        {"conversation": "z", "m": {"gain": 1}},
        [1],
    ],
)
def test_a_file_without_digests_or_gains_is_one_error(
    line: object, gains: Gains, rows_file: Path, examined: Callable[..., PreparedData]
) -> None:
    """The first is a line of an older version."""
    file = gains(record(read(rows_file)[0], tiny=1.0), line)
    with pytest.raises(UserError) as refused:
        examined(sources=[{"path": str(rows_file), "min_gain": str(file)}])
    assert str(refused.value) == (
        f"data.sources.0.min_gain: {file}:2: no `conversation` with its `gain`: it is another file, or an older "
        f"version wrote it. Write it anew: `python scripts/evaluate.py gain --model MODEL --data {rows_file}`."
    )


def test_a_compressed_file_is_one_error(
    gains: Gains, rows_file: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    file = gains()
    file.write_bytes(gzip.compress(b"{}"))
    recipe = recipe_file(data={"sources": [{"path": str(rows_file), "min_gain": str(file)}]})
    assert f"data.sources.0.min_gain: {file}:1: no `conversation` with its `gain`" in refused("--recipe", recipe)


def test_gains_of_other_rows_or_of_no_row_above_0_are_one_error(
    gains: Gains, rows_file: Path, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    rows = read(rows_file)
    file = gains(record([*rows[0], {"role": "user", "content": "more"}], tiny=1.0))
    source = {"path": str(rows_file), "min_gain": str(file), "ignore": ["messages[].note"]}
    recipe = recipe_file(data={"sources": [source]})
    assert refused("--recipe", recipe) == (
        f"data.sources.0.min_gain: {file} has none of the 24 rows of {rows_file}. Write it anew: `python "
        f"scripts/evaluate.py gain --model MODEL --data {rows_file} --ignore 'messages[].note'`."
    )
    gains(*(record(row, tiny=0.0) for row in rows))
    assert refused("--recipe", recipe, "--check") == (
        f"data.sources.0.min_gain: each of the 24 rows of {rows_file} has a gain of 0 or less in {file}, so none is "
        "left. Remove the key or the source."
    )
    file.unlink()
    (file.parent / "gain_row.jsonl").touch()
    assert f": data.sources.0.min_gain: there is no file {file}." in refused("--recipe", recipe)


def test_data_generation_has_no_such_key() -> None:
    """It would have no effect there."""
    with pytest.raises(ValidationError, match="min_gain"):
        Source.model_validate({"path": "rows.jsonl", "min_gain": "gain_rows.jsonl"})
