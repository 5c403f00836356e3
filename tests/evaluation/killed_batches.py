"""Runs whose process is killed at a batch of a local model."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def killed_at_a_call(module: str, owner: str, function: str) -> str:
    """Return code that kills its process at a call of `function`, which belongs to `owner` in `module`.

    Its first argument: the number of calls before the kill.
    """
    return f"""
import os, signal, sys
from {module} import {owner}
left, call = int(sys.argv.pop(1)), {owner}.{function}
def until_killed(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)
{owner}.{function} = until_killed
"""


KILLED_AFTER_BATCHES = killed_at_a_call("train.evaluation.models", "local", "generate_batch")
"""For batches of answers."""

ROOT = Path(__file__).parents[2]
_COMMAND = """
import runpy
runpy.run_path("scripts/evaluate.py", run_name="__main__")
"""

Answers = set[tuple[bytes, str, float]]


def stored_answers(journal: Path) -> Answers:
    """Return key, text and time of each answer in a journal."""
    with sqlite3.connect(journal) as connection:
        return set(connection.execute("SELECT key, text, asked_at FROM answers").fetchall())


def run_until_killed(
    arguments: Sequence[str | Path], tmp_path: Path, killed_after: str = KILLED_AFTER_BATCHES, batches: int = 3
) -> None:
    """Run scripts/evaluate.py in a process that is killed after `batches` of those that `killed_after` counts."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what is killed leaves its temporary files
    killed = [sys.executable, "-W", "ignore", "-c", killed_after + _COMMAND, str(batches), *map(str, arguments)]
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


def check_killed_run(
    command: Callable[..., int], arguments: Sequence[str | Path], tmp_path: Path, kind: str, rows: str
) -> tuple[int, int]:
    """Return the numbers of answers at the kill and at the end of a run that was killed and started again.

    Check that it keeps its answers, and that `rows` and the figures of `kind` are those of an uninterrupted run.
    """
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    journal, figures = f"{kind}.sqlite", f"{kind}.json"
    run_until_killed([*arguments, "--output-dir", broken], tmp_path)
    before = stored_answers(broken / journal)
    assert not (broken / figures).exists()
    for out in (broken, whole):
        assert command(*arguments, "--output-dir", out) == 0
    assert before < stored_answers(broken / journal)
    count = len(stored_answers(whole / journal))
    assert len(stored_answers(broken / journal)) == count
    for name in (figures, rows):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    return len(before), count
