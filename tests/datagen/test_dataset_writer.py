"""Dataset files: a restarted run leaves equal rows alone, and never mixes its rows with those of another run."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from train.datagen.config import OutputSection
from train.datagen.dataset_writer import RowFiles, open_row_files

SCHEMA = pyarrow.schema([("text", pyarrow.string())])


def open_files(folder: Path, format: str) -> RowFiles:
    return open_row_files(folder, OutputSection(format=format, rows_per_file=2), SCHEMA)


def rows(folder: Path) -> list[str]:
    """Return the rows that a reader of the folder finds."""
    if (folder / "rows.jsonl").exists():
        return [line[10:-2] for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    paths = sorted(folder.glob("rows-*.parquet"))
    return [text for path in paths for text in pyarrow.parquet.read_table(path)["text"].to_pylist()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_of_a_run_with_other_settings_are_never_mixed_with_earlier_ones(tmp_path: Path, format: str) -> None:
    files = open_files(tmp_path, format)
    for row in range(7):
        files.write({"text": f"old {row}"})
    files.finish()
    files.close()
    other = open_files(tmp_path, format)
    for row in range(2):
        other.write({"text": f"old {row}"})
    assert rows(tmp_path) == [f"old {row}" for row in range(7)]  # the same so far: nothing is lost
    for row in range(2, 4):
        other.write({"text": f"new {row}"})
    assert rows(tmp_path) == ["old 0", "old 1", "new 2", "new 3"]  # killed here, no row of the old run is left
    other.finish()
    other.close()
    assert rows(tmp_path) == ["old 0", "old 1", "new 2", "new 3"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_same_run_gives_the_same_bytes_and_removes_rows_behind_its_last_one(tmp_path: Path, format: str) -> None:
    for count in (5, 5, 3):
        files = open_files(tmp_path, format)
        for row in range(count):
            files.write({"text": f"row {row}"})
        files.finish()
        files.close()
        assert rows(tmp_path) == [f"row {row}" for row in range(count)]
