"""scripts/prepare.py: its output, errors and exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
from broken_output import broken_stdout

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepare(
    load_script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], int]:
    """Return a function that prepares a recipe's data in this process."""
    monkeypatch.chdir(ROOT)

    def run(recipe: Path) -> int:
        cache = f"data.cache_dir={tmp_path / 'cache'}"
        monkeypatch.setattr("sys.argv", ["scripts/prepare.py", "--recipe", str(recipe), cache])
        return int(load_script("prepare").main())

    return run


@pytest.fixture
def run(prepare: Callable[[Path], int], capsys: pytest.CaptureFixture[str]) -> Callable[[Path], CompletedProcess[str]]:
    def run(recipe: Path) -> CompletedProcess[str]:
        capsys.readouterr()
        return CompletedProcess([recipe], prepare(recipe), *capsys.readouterr())

    return run


def test_the_second_call_reads_the_cache_and_skipped_files_are_reported(
    run: Callable[[Path], CompletedProcess[str]], recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = rows_file.read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(rows + '{"messages": []}\n', encoding="utf-8")
    (folder / "rows.jsonl.bak").write_text(rows, encoding="utf-8")
    recipe = recipe_file(
        data={"sources": [{"path": str(folder)}], "on_bad_row": "skip", "max_length": 200, "overlong": "drop"}
    )
    first = run(recipe)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert f"{folder}: tokenized (fastokens, checked on a sample)" in lines or any(
        line.startswith(f"{folder}: tokenized (the tokenizer itself") for line in lines
    )
    assert any(line.startswith("dropped rows: ") and f"{folder}/rows.jsonl:25" in line for line in lines)
    assert any(line.startswith("dropped rows: ") and "dropped, training, over 200 tokens" in line for line in lines)
    assert any(line.startswith("warning: 1 file was skipped") and "rows.jsonl.bak" in line for line in lines)
    second = run(recipe)
    assert f"{folder}: read from cache" in second.stdout
    assert [line for line in second.stdout.splitlines() if line.startswith("training: ")] == [
        line for line in lines if line.startswith("training: ")
    ]


def test_invalid_rows_are_one_error(
    run: Callable[[Path], CompletedProcess[str]], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": []}) + "\n", encoding="utf-8")
    result = run(recipe_file(data={"sources": [{"path": str(bad)}]}))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert f"{bad}:1" in result.stderr


def test_a_reader_that_exits_early_causes_no_traceback(
    prepare: Callable[[Path], int], recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file()
    with broken_stdout("unread"):
        assert prepare(recipe) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
