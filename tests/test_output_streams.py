"""Output that the terminal can't encode is escaped, files are UTF-8 in any locale, and no file name crashes a command."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.cli import CommandLine
from train.data.sources.source import read_rows
from train.recipe import Source

ROOT = Path(__file__).parents[1]
ASCII = {
    "a stream of ASCII": {"PYTHONIOENCODING": "ascii"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "the POSIX locale of a container": {"LC_ALL": "POSIX", "LANG": "", "PYTHONIOENCODING": "ascii:strict"},
}
PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from train.cli import CommandLine, run_command
from train.errors import UserError
from train.progress import progress_bar
from train.storage.atomic_write import write_text
CommandLine(description="{description}").parse_args(sys.argv[2:])
TEXT = chr(0xe8) + chr(0x1f332) + chr(0xdce9)
def act():
    print("printed", TEXT)
    print("warned", TEXT, file=sys.stderr)
    warnings.warn("of " + TEXT)
    logging.warning("logged %s", TEXT)
    with progress_bar("a job of " + TEXT, total=2) as bar:
        bar.show("shown " + TEXT)
    write_text(Path(sys.argv[1]), TEXT)
    raise {raised}("raised " + TEXT)
sys.exit(run_command(act, "stopped"))
"""
ESCAPED = r"\xe8\U0001f332\udce9"


def started(code: str, environment: dict[str, str], *arguments: str | Path | bytes) -> tuple[int, str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    return result.returncode, result.stdout.decode("ascii"), result.stderr.decode("ascii")


@pytest.mark.parametrize("name", ASCII)
def test_all_output_of_a_command_is_escaped(name: str, tmp_path: Path) -> None:
    for raised, code in (("UserError", 2), ("RuntimeError", 1)):
        returned, output, errors = started(
            PROGRAM.format(description="x", raised=raised), ASCII[name], tmp_path / "file"
        )
        assert returned == code
        for words in ("printed ", "shown "):
            assert words + ESCAPED in output
        for words in ("warned ", "of ", "logged ", "error: raised " if code == 2 else "RuntimeError: raised "):
            assert words + ESCAPED in errors
        assert (tmp_path / "file").read_bytes() == "è🌲".encode() + rb"\udce9"


def test_help_is_escaped(tmp_path: Path) -> None:
    code = PROGRAM.format(description=r"\xe8", raised="RuntimeError")
    returned, output, _ = started(code, ASCII["a stream of ASCII"], tmp_path, "--help")
    assert (returned, r"\xe8" in output) == (0, True)


def test_an_argument_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    code = PROGRAM.format(description="x", raised="UserError")
    returned, _, output = started(code, {"PYTHONUTF8": "1"}, tmp_path / "file", b"key=caf\xe9")
    assert returned == 2
    assert r"error: argument b'key=caf\xe9': not UTF-8. Rename the file" in output
    returned, _, output = started(code, ASCII["the C locale"], tmp_path / "file", "key=café".encode())
    assert returned == 2
    assert "this locale can't represent these characters. Set LC_ALL=C.UTF-8" in output


def test_a_file_name_that_the_locale_cannot_encode_is_an_error() -> None:
    code = "import sys; from train.cli import run_command; sys.exit(run_command(lambda: open(chr(0xe9)), ''))"
    returned, _, output = started(code, ASCII["the C locale"])
    assert returned == 2
    assert output.strip() == r"error: this locale (ascii) can't represent '\xe9'. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."


@pytest.mark.parametrize("parse", ["parse_args", "parse_intermixed_args", "parse_known_args"])
def test_all_parse_methods_check_their_arguments(parse: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandLine()
    parser.add_argument("words", nargs="*")
    with pytest.raises(SystemExit, match="2"):
        getattr(parser, parse)(["caf\udce9"])
    assert r"argument b'caf\xe9': not UTF-8" in capsys.readouterr().err
    getattr(parser, parse)(["café"])


def run_in_ascii(*arguments: str | Path) -> tuple[int, bytes]:
    """Run train/sft.py with an ASCII log as standard output; return exit code and output."""
    from train.sft import main

    written = io.BytesIO()
    with (
        io.TextIOWrapper(written, encoding="ascii", write_through=True) as stream,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stream)
        return main([str(argument) for argument in arguments]), written.getvalue()


def test_training_escapes_names_that_the_log_cannot_encode(
    recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "modèle")
    recipe = recipe_file(
        model={"name_or_path": str(tmp_path / "modèle")},
        output_dir=str(tmp_path / "sortie-é"),
        training={"max_steps": 1, "num_train_epochs": ...},
    )
    code, output = run_in_ascii("--recipe", recipe)
    assert code == 0
    assert rb"mod\xe8le" in output
    assert rb"sortie-\xe9" in output
    assert "modèle" in (tmp_path / "sortie-é" / "report.md").read_text("utf-8")


def test_files_whose_names_are_not_text_are_read(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for name in (b"caf\xe9.jsonl", b"\xff.json", b"notes-\xe9.txt"):
        Path(folder, os.fsdecode(name)).write_text(json.dumps(row), encoding="utf-8")
    places = [place for place, _ in read_rows(Source(path=str(folder)))]
    assert places == [rf"{folder}/caf\udce9.jsonl:1", rf"{folder}/\udcff.json row 1"]
    report = tmp_path / "report.json"
    recipe = recipe_file(data={"sources": [{"path": str(folder)}]})
    code, output = run_in_ascii("--recipe", recipe, "--check", "--json", report)
    assert code == 0
    assert rb"notes-\udce9.txt" in output
    assert rb"caf\udce9.jsonl" in output
    assert rb"caf\\udce9.jsonl" in report.read_bytes()
