"""kill -9 during SysBench: no answer and no judgement is lost, and the files have the same bytes."""

import multiprocessing
import re
import signal
import sqlite3
import time
from pathlib import Path

from evaluate_processes import evaluate_script, run_process
from killed_processes import killed_afterwards
from scripted_server import Asked, Reply, said, served
from sysbench_data import conversation, write_file

CONVERSATIONS = 4
ANSWERS = 5 * CONVERSATIONS
RETRIES = 1
"""Repeated requests: on one turn, whose verdict is unparsable."""
CONCURRENCY = 2

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(
    ["train.evaluation.turns.command", "train.evaluation.models.responses", "matplotlib.pyplot"]
)


async def script(asked: Asked) -> Reply:
    """Answer each turn with its number; the judge finds some criteria not met and gives no verdict on one turn."""
    numbers = re.findall(r"^(\d+)\. Criterion (\d+)\.(\d+)\.", asked.prompt, re.MULTILINE)
    if asked.body["model"] != "judge":
        return said(f"Answer to {asked.prompt}")
    if not numbers or numbers[0][1:] == ("2", "3"):
        return said("hm")
    return said("\n".join(f"{number}: {'no' if row == turn else 'yes'}" for number, row, turn in numbers))


def kept(folder: Path) -> int:
    with sqlite3.connect(folder / "sysbench.sqlite") as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


def test_killed_runs_lose_nothing_and_write_the_files_of_an_uninterrupted_run(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.json", [conversation(number) for number in range(CONVERSATIONS)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    evaluate = evaluate_script()

    def options(url: str, folder: Path) -> list[str]:
        return [
            "turns", "--model", "m", "--server", url, "--concurrency", str(CONCURRENCY), "--sysbench", str(data),
            "--judge", "judge", "--judge-server", url, "--judge-concurrency", str(CONCURRENCY),
            "--retries", "1", "--output-dir", str(folder),
        ]  # fmt: skip

    with served(script, models=["m", "judge"]) as server, killed_afterwards(processes) as start:
        assert evaluate.main(options(server.url, whole)) == 0
        assert kept(whole) == 2 * ANSWERS + RETRIES
        given_before = server.answered.total() - server.answered["Hi"]
        lost = 0
        for moment in (ANSWERS // 2, ANSWERS + ANSWERS // 2):  # among the answers, and among the judgements
            enough = given_before + moment
            process = start(run_process, tmp_path, *options(server.url, killed))
            while server.answered.total() - server.answered["Hi"] < enough and process.is_alive():
                time.sleep(0.0005)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, (tmp_path / "printed").read_text()  # in the middle of it
            lost = server.answered.total() - server.answered["Hi"] - given_before - kept(killed)
        assert evaluate.main(options(server.url, killed)) == 0
        # Nothing was answered twice but what was on its way at a kill.
        assert server.answered.total() - server.answered["Hi"] - given_before - kept(killed) == lost
        assert lost <= 2 * 2 * CONCURRENCY
        asked = len(server.asked)
        assert evaluate.main(options(server.url, killed)) == 0
        assert len(server.asked) == asked  # a further start asks nothing
    for name in ("sysbench_rows.jsonl", "sysbench.json", "report.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
