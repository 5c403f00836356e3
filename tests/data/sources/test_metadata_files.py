"""Metadata files are not read as rows, whatever their names; files with rows are, whatever theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from train.data.sources.metadata_files import describe_metadata_file
from train.data.sources.source import open_source, read_rows
from train.errors import UserError
from train.recipe import Source

ROWS = [{"prompt": f"p{number}", "output": "o"} for number in range(3)]
FEATURES = {
    "messages": [{"role": {"dtype": "string", "_type": "Value"}}],
    "output": {"dtype": "string", "_type": "Value"},
}
INFO = {"description": "", "citation": "", "features": FEATURES, "splits": {"train": {"name": "train", "num_bytes": 9}}}
LLAMA_FACTORY = {
    "mine": {"file_name": "mine.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "theirs": {"hf_hub_url": "someone/data"},
}
# (name of the file, its content, what it is)
METADATA_FILES: list[tuple[str, Any, str]] = [
    ("dataset_infos.json", {"default": INFO, "small": INFO}, "datasets' description"),
    ("dataset_infos.json", {"default": {"splits": {"train": {"num_examples": 12}}}}, "datasets' description"),
    ("dataset_infos.json", {}, "datasets' description"),
    ("dataset_info.json", INFO, "datasets' description"),
    ("dataset_info.json", LLAMA_FACTORY, "LLaMA-Factory's list"),
    ("my_datasets.json", LLAMA_FACTORY, "LLaMA-Factory's list"),
    ("dataset-metadata.json", {"title": "t", "id": "a/b", "licenses": [{"name": "MIT"}]}, "Kaggle's"),
    ("dataset-metadata.json", {"title": "t"}, "Kaggle's"),
    ("rows.croissant.json", {"@context": {}, "@type": "sc:Dataset", "recordSet": [{"name": "rows"}]}, "Croissant"),
    ("datapackage.json", {"name": "n", "resources": [{"name": "rows", "path": "rows.csv"}]}, "Frictionless"),
    ("metadata.json", {"version": 1, "rows": 3, "columns": ["prompt"]}, "a description of the data"),
    ("state.json", {"_data_files": [], "_fingerprint": "f", "_split": None}, "save_to_disk"),
]  # fmt: skip
# the same names, and real rows
ROWS_UNDER_SUCH_NAMES: list[tuple[str, Any]] = [
    ("dataset_info.json", ROWS),
    ("metadata.json", ROWS[0]),
    ("metadata.json", {"version": 1, "data": ROWS}),
    ("dataset_infos.json", {str(number): row for number, row in enumerate(ROWS)}),
    ("manifest.json", {"train": ROWS, "test": ROWS}),
    ("features.json", {"features": ROWS}),
    ("rows.json", {row["prompt"]: {"file_name": f"{row['prompt']}.py", **row} for row in ROWS}),
    ("rows.json", {row["prompt"]: {"script_url": "https://example.org/a.py", **row} for row in ROWS}),
    ("rows.json", {"@context": "https://schema.org", "data": ROWS}),
    ("rows.json", {"id": "a/b", "title": "t", "licenses": "MIT", "data": ROWS}),
    ("rows.json", {"resources": [{"path": "a.py", **row} for row in ROWS]}),
    ("rows.json", {"_data_files": "a.csv", "data": ROWS}),
]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def jsonl(path: Path) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def rows_of(path: Path | str, **keys: Any) -> list[Any]:
    return [row for _, row in read_rows(Source(path=str(path), **keys))]


def error_of(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path)
    return str(caught.value)


@pytest.mark.parametrize(("name", "content", "kind"), METADATA_FILES)
def test_a_metadata_file_is_skipped_in_a_folder_and_refused_by_name(
    name: str, content: Any, kind: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data" / name, content)
    assert kind in (describe_metadata_file(path) or "")
    assert kind in error_of(path)
    for split in ("data/rows.jsonl", "data/test.jsonl"):
        jsonl(tmp_path / split)
    jsonl(tmp_path / "train" / "train-00000.jsonl")
    write(tmp_path / "train" / name, content)
    if name != "state.json":
        opened = open_source(Source(path=str(tmp_path / "train")))
        assert opened.metadata_files == [f"{tmp_path / 'train' / name} ({describe_metadata_file(path)})"]
        assert rows_of(tmp_path / "train") == ROWS
    assert rows_of(tmp_path / "data" / "*") == ROWS + ROWS
    only = write(tmp_path / "only" / "below" / name, content)
    error = error_of(only.parent.parent)
    assert "no data file in this folder" in error
    assert f"{name} ({describe_metadata_file(path)})" in error
    assert f"only metadata: {name}" in error_of(tmp_path / "only" / "*" / "*.json")


@pytest.mark.parametrize(("name", "content"), ROWS_UNDER_SUCH_NAMES)
def test_rows_are_rows_under_any_name(name: str, content: Any, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    assert describe_metadata_file(path) is None
    if name != "manifest.json":  # two lists: which one is meant?
        rows = rows_of(path)
        assert rows == rows_of(tmp_path)
        assert [{key: row[key] for key in ROWS[0]} for row in rows] == (ROWS[:1] if content == ROWS[0] else ROWS)


def test_a_file_that_is_not_valid_json_is_not_a_metadata_file(tmp_path: Path) -> None:
    assert describe_metadata_file(write(tmp_path / "dataset_info.json", '{"features"')) is None
    assert describe_metadata_file(write(tmp_path / "dataset_infos.jsonl", INFO)) is None
    assert "invalid JSON" in error_of(tmp_path / "dataset_info.json")


def test_files_that_datasets_writes(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "above" / "saved"))
    assert rows_of(tmp_path / "above" / "saved") == ROWS
    error = error_of(tmp_path / "above")
    assert "no data file in this folder, only metadata" in error
    assert f"To read what save_to_disk wrote, name {tmp_path}/above/saved" in error
    jsonl(tmp_path / "beside" / "rows.jsonl")
    dataset.info.write_to_directory(str(tmp_path / "beside"))
    assert (tmp_path / "beside" / "dataset_info.json").is_file()
    assert rows_of(tmp_path / "beside") == ROWS


def test_a_folder_with_the_state_of_another_program_is_not_a_saved_data_set(tmp_path: Path) -> None:
    write(tmp_path / "state.json", {"step": 7})
    jsonl(tmp_path / "rows.jsonl")
    assert rows_of(tmp_path) == ROWS
    assert open_source(Source(path=str(tmp_path))).metadata_files == [f"{tmp_path}/state.json (the state of a program)"]


def test_check_lists_skipped_metadata_files(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.sft import main

    jsonl(tmp_path / "lf" / "mine.jsonl")
    listed = write(tmp_path / "lf" / "dataset_info.json", LLAMA_FACTORY)
    recipe = recipe_file(data={"sources": [{"path": str(tmp_path / "lf")}]})
    assert main(["--recipe", str(recipe), "--check"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert f"1 file was skipped (metadata without rows): {listed} (LLaMA-Factory's list of data sets)" in page
