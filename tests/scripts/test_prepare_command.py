"""scripts/prepare.py, run as a process: its output, errors and exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "scripts" / "prepare.py", *arguments, f"data.cache_dir={tmp_path / 'cache'}"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)

    return run


def test_the_second_call_reads_the_cache_and_skipped_files_are_reported(
    run: Callable[..., subprocess.CompletedProcess], recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = rows_file.read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(rows + '{"messages": []}\n', encoding="utf-8")
    (folder / "rows.jsonl.bak").write_text(rows, encoding="utf-8")
    recipe = recipe_file(
        data={"sources": [{"path": str(folder)}], "on_bad_row": "skip", "max_length": 200, "overlong": "drop"}
    )
    first = run("--recipe", recipe)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert f"{folder}: tokenized (fastokens, checked on a sample)" in lines or any(
        line.startswith(f"{folder}: tokenized (the tokenizer itself") for line in lines
    )
    assert any(line.startswith("dropped rows: ") and f"{folder}/rows.jsonl:25" in line for line in lines)
    assert any(line.startswith("dropped rows: ") and "dropped, training, over 200 tokens" in line for line in lines)
    assert any(line.startswith("warning: 1 file was skipped") and "rows.jsonl.bak" in line for line in lines)
    second = run("--recipe", recipe)
    assert f"{folder}: read from cache" in second.stdout
    assert [line for line in second.stdout.splitlines() if line.startswith("training: ")] == [
        line for line in lines if line.startswith("training: ")
    ]


def test_invalid_rows_are_one_error(
    run: Callable[..., subprocess.CompletedProcess], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": []}) + "\n", encoding="utf-8")
    result = run("--recipe", recipe_file(data={"sources": [{"path": str(bad)}]}))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert f"{bad}:1" in result.stderr


def test_a_reader_that_exits_early_causes_no_traceback(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "prepare.py", "--recipe", recipe_file()]
    read, written = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*command, f"data.cache_dir={tmp_path / 'cache'}"],
        stdout=written, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    os.close(written)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
