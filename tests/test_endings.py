"""Exit codes of commands whose standard output is full (2 and one `error:`) or a pipe without a reader (1, silently)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from broken_output import broken_stdout, everywhere, needs_full, open_output
from scripted_server import Asked, Reply, said, served

ROOT = Path(__file__).parents[1]
RULES = "class Rule:\n    check = staticmethod(lambda question, text: True)\n\nRULES = {'any': Rule}\n"
FULL = "error: standard output can't be written: No space left on device.\n"


def started(where: str, *command: object) -> tuple[int, str]:
    """Run a command whose standard output is full or a pipe without a reader; return exit code and standard error."""
    output = open_output(where)
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(output)
    return result.returncode, result.stderr


@pytest.fixture
def called(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that calls a command in this process with such a standard output; otherwise like `started`."""

    def call(where: str, main: Callable[..., int], *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with broken_stdout(where):
            code = main(*arguments)
        return code, capsys.readouterr().err

    return call


ENDS = {"full": (2, FULL), "unread": (1, "")}


@everywhere
@pytest.mark.parametrize(
    "act",
    [
        "print('a line')",
        "print('a line', flush=True)",
        "print('x' * 1_000_000)",
        "sys.stdout.writelines(['a', 'line'])",
    ],
)
def test_output_that_cannot_be_written_ends_the_command(where: str, act: str) -> None:
    """Short output stays in a buffer until the end; long output doesn't."""
    code = f"import sys; from train.cli import run_command; sys.exit(run_command(lambda: {act}, 'stopped'))"
    assert started(where, "-c", code) == ENDS[where]


@everywhere
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [("UserError('fix it')", 2, "error: fix it\n"), ("KeyboardInterrupt", 130, "stopped\n")],
)
def test_other_errors_are_reported_instead_of_lost_output(where: str, error: str, code: int, message: str) -> None:
    program = f"""
import sys
from train.cli import run_command
from train.errors import UserError
def act():
    print("a line")
    raise {error}
sys.exit(run_command(act, "stopped"))
"""
    assert started(where, "-c", program) == (code, message)


@needs_full
def test_a_full_disk_elsewhere_is_not_reported_as_lost_output() -> None:
    act = "open('/dev/full', 'w').write('x' * 100_000)"
    code, stderr = started(
        "full", "-c", f"import sys; from train.cli import run_command; sys.exit(run_command(lambda: {act}, ''))"
    )
    assert code == 1
    assert stderr.startswith("Traceback")
    assert "standard output" not in stderr


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number in range(4):
            texts = {"system": f"Be {number % 2}.", "user": f"question {number // 2}", "assistant": f"answer {number}"}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            lines.write(json.dumps({"messages": messages, "rule": "any", "held_out": "rule"}) + "\n")
    return path


@everywhere
def test_evaluations_write_results_before_they_print(
    where: str, rows: Path, tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int],
    called: Callable[..., tuple[int, str]],
) -> None:  # fmt: skip
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    after = tmp_path / "after"
    after.mkdir()
    for path in tiny_chat_model.iterdir():
        (after / path.name).write_bytes(path.read_bytes())
    models = ["--rules", tmp_path / "rules.py", "--data", rows, "--before", tiny_chat_model, "--after", after]
    assert called(where, command, "rules", *models, "--max-new-tokens", "2") == ENDS[where]
    assert json.loads((after / "adherence.json").read_text("utf-8"))["rule"]["any"]["rows"] == 4
    assert called(where, command, "gain", "--model", after, "--data", rows) == ENDS[where]
    assert json.loads((after / "gain.json").read_text("utf-8"))["data"] == [str(rows)]
    shutil.copytree(after, tmp_path / "again")
    assert started(where, "scripts/evaluate.py", "compare", tmp_path / "again", after) == ENDS[where]
    assert json.loads((after / "compare.json").read_text("utf-8"))["measures"]


async def good_everything(asked: Asked) -> Reply:
    """Answer the collection's requests well enough for a row; SYSGEN sends none here."""
    requested = asked.prompt.rpartition("\n### ")[2].splitlines()[1:]
    names = [line[2:].partition(",")[0] for line in requested if line.startswith("- ")]
    lines = "\n".join(f"{name}: Kind {asked.number} for {place}." for place, name in enumerate(names))
    return said(lines or f"You are helper {asked.number}.")


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Path]:
    """Write a configuration that works for sysgen and collection, and run its server."""
    rows = tmp_path / "plain.jsonl"
    messages = [{"role": "user", "content": "Which rivers are long?"}, {"role": "assistant", "content": "The Nile."}]
    rows.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    with served(good_everything) as server:
        config = {
            "model": "m",
            "servers": [{"base_url": server.url}],
            "data": {"sources": [{"path": str(rows)}]},
            "output_dir": str(tmp_path / "out"),
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        yield tmp_path / "config.yaml"


@everywhere
@pytest.mark.parametrize("script", ["sysgen", "collection"])
def test_data_pipelines_write_rows_before_they_print(
    where: str, script: str, asking: Path, tmp_path: Path, load_script: Callable[[str], ModuleType],
    called: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = ["message=common", "answers=original"] if script == "sysgen" else []
    words = [f"scripts/{script}.py", "--config", str(asking), *more]
    monkeypatch.setattr("sys.argv", [*words, "--check"])
    assert called(where, load_script(script).main) == ENDS[where]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", words)
    assert called(where, load_script(script).main) == ENDS[where]
    assert (tmp_path / "out" / "report.md").is_file()
    assert (tmp_path / "out" / "data" / "rows.jsonl").read_text("utf-8")
