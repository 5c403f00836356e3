"""kill -9 at any moment of the bench: no answer is requested twice, and the files have the same bytes."""

import json
import multiprocessing
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from bench_runs import FIRST_CONTACT, bench_row, command, place_of, write_lines
from evaluate_processes import run_process
from killed_processes import killed_afterwards
from scripted_server import Asked, Reply, ScriptedServer, error, said, served

ROWS = 10
KILLS = 4
RUNS = 2
RESPONSES, JUDGEMENTS = ROWS, ROWS * 4 * RUNS
CONCURRENCY = 8

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(
    ["train.multifaceted.bench.report", "train.evaluation.models.responses", "matplotlib.pyplot"]
)


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Start processes of the command; none outlives its test."""
    with killed_afterwards(processes) as begin:
        yield partial(begin, run_process)


async def script(asked: Asked) -> Reply:
    """Give the same answer to the same question after a moment; to some only at the second attempt."""
    if asked.body["model"] != "judge":
        return said(f"Answer to {asked.prompt}")
    if asked.prompt == FIRST_CONTACT:
        return said("Feedback")
    row, rubric = place_of(asked.prompt)
    if (row, rubric) == (3, 1):
        return said("no verdict")
    if (row, rubric) == (5, 0) and asked.times % 2 == 0:
        return error(429, "busy", headers={"retry-after": "0"})
    return said(f"[RESULT] {(row + rubric) % 5 + 1}")


def answers_in(folder: Path) -> int:
    with sqlite3.connect(folder / "bench.sqlite") as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


def answers_given(server: ScriptedServer) -> int:
    return server.answered.total() - server.answered[FIRST_CONTACT]


def test_killed_runs_lose_nothing_and_write_the_files_of_an_uninterrupted_run(
    tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(ROWS)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()

    def options(url: str, folder: Path) -> list[str]:
        return [
            "--model", "m", "--server", url, "--concurrency", str(CONCURRENCY), "--data", str(data),
            "--judge", "judge", "--judge-server", url, "--judge-concurrency", str(CONCURRENCY),
            "--runs", str(RUNS), "--retries", "1", "--output-dir", str(folder),
        ]  # fmt: skip

    with served(script, models=["judge"]) as server:
        assert command(*options(server.url, whole)) == 0
        needed = len(server.asked)
        assert answers_in(whole) == RESPONSES + JUDGEMENTS + RUNS  # a second try in each run of the one rubric
        answered_before = answers_given(server)
        lost = 0
        moments = sorted(random.Random(7).sample(range(2, needed - 10), KILLS))
        for moment in moments:
            enough = needed + moment + lost
            process = start(tmp_path, "bench", *options(server.url, killed))
            while len(server.asked) < enough and process.is_alive():
                time.sleep(0.0005)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL  # it was in the middle of it
            if (killed / "bench.sqlite").exists():
                lost = answers_given(server) - answered_before - answers_in(killed)
        process = start(tmp_path, "bench", *options(server.url, killed))
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "printed").read_text()
        # Nothing was answered twice but what was on its way at a kill.
        repeated = answers_given(server) - answered_before - answers_in(killed)
        assert repeated == lost <= KILLS * (CONCURRENCY + CONCURRENCY // 4)
        asked = len(server.asked)
        process = start(tmp_path, "bench", *options(server.url, killed))
        process.join(120)
        assert process.exitcode == 0
        assert len(server.asked) == asked  # a further start asks nothing
    for name in ("bench_rows.jsonl", "bench.json", "report.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    record = json.loads((killed / "bench.json").read_text())
    assert record["missing"]["judgements_missing"] == {"unparsable": RUNS, "no answer": 0, "pending": 0}
    expected = [[(row + rubric) % 5 + 1 for rubric in range(4) if (row, rubric) != (3, 1)] for row in range(ROWS)]
    assert record["score"]["mean"] == pytest.approx(sum(sum(scores) / len(scores) for scores in expected) / ROWS)


def test_half_written_results_replace_nothing(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(0)])
    with served(script, models=["judge"]) as server:
        options = [
            "--model",
            "m",
            "--server",
            server.url,
            "--data",
            data,
            "--judge",
            "judge",
            "--judge-server",
            server.url,
        ]
        assert command(*options, "--output-dir", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"bench.json", "bench_rows.jsonl", "bench.png", "report.md", "bench.sqlite"} <= names
    assert not [name for name in names if "partial" in name]
