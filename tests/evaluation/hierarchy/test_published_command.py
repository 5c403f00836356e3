"""scripts/evaluate.py hierarchy with published sets: files, compare, errors, and kill -9."""

import json
import multiprocessing
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from evaluate_processes import run_process
from killed_batches import run_until_killed, stored_answers
from killed_processes import killed_afterwards
from published_rows import write_realguardrails, write_tensortrust
from published_runs import FIRST_CONTACT, answers_everything
from scripted_server import Asked, Reply, ScriptedServer, chat_reply, served

KILLED_AT = (30, 100)
"""Numbers of requests before a kill: while the model answers, and while the judge does."""
CONCURRENCY = 4

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(
    ["train.evaluation.hierarchy.published_sets", "train.evaluation.models.responses", "matplotlib.pyplot"]
)


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Start processes of the command; none outlives its test."""
    with killed_afterwards(processes) as begin:
        yield partial(begin, run_process)


def arguments_of(url: str, data: Path, out: Path) -> list[str]:
    """Return the options of a run with both published sets and few rows of ours."""
    return [
        *("--model", "m", "--server", url, "--concurrency", str(CONCURRENCY), "--settings", "reference", "--rows", "6"),
        *("--tensortrust", str(write_tensortrust(data / "tensortrust"))),
        *("--realguardrails", str(write_realguardrails(data / "guardrails", handwritten=16, distractors=16))),
        *("--judge", "judge", "--judge-server", url, "--judge-concurrency", str(CONCURRENCY), "--retries", "1"),
        *("--output-dir", str(out)),
    ]


def test_published_sets_are_in_all_files_and_in_compare(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    with served(answers_everything, ["judge"]) as server:
        assert command("hierarchy", *arguments_of(server.url, tmp_path, out)) == 0
        assert server.asked[0].prompt == FIRST_CONTACT  # the judge is there, before the model answers for hours
        assert [asked.prompt for asked in server.asked].count(FIRST_CONTACT) == 1
    shown = capsys.readouterr().out
    record = json.loads((out / "hierarchy.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "hierarchy_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = {name: len([line for line in lines if line["set"] == name]) for name in ("pressure", *record)}
    assert {name: count for name, count in counts.items() if count} == {
        "pressure": 6,
        "tensortrust": 40,
        "realguardrails": 32,
    }
    table = {part["name"]: (part["rows"], part["held"]["value"]) for part in record["table"]}
    assert table == {
        "reference": (6, table["reference"][1]),
        "TensorTrust, all rows": (40, pytest.approx((7 / 16 + 6 / 16 + 6 / 8) / 3)),
        "TensorTrust, without post-prompts": (25, pytest.approx((4 / 10 + 6 / 10 + 4 / 5) / 3)),
        "RealGuardrails, handwritten": (10, pytest.approx(0.6)),
        "RealGuardrails, distractors": (11, pytest.approx(4 / 11)),
        "RealGuardrails, score": (21, pytest.approx((0.6 + 4 / 11) / 2)),
    }
    report = (out / "report.md").read_text(encoding="utf-8")
    assert report.strip() in shown
    assert "| RealGuardrails, score | 21 | 48.2 % [" in report
    assert "judged by judge with a prompt in our words (version 1); 5 answers failed by a banned word alone." in report
    assert "warning: TensorTrust: 5 prompts got no answer and fail; the first: 400" in shown

    async def more_generous(asked: Asked) -> Reply:
        """Tell the password to nobody."""
        reply = await answers_everything(asked)
        return chat_reply("Go away.") if b"The password is" in json.dumps(reply.body).encode() else reply

    with served(more_generous, ["judge"]) as server:
        assert command("hierarchy", *arguments_of(server.url, tmp_path, other)) == 0
    capsys.readouterr()
    assert command("compare", out, other) == 0
    pairs = {pair["measure"]: pair for pair in json.loads((other / "compare.json").read_text())["measures"]}
    # At 7 of 8 doors one of the two attacks told the password: (7 / 16) / 3 on the score, over rows with their weights.
    score = pairs["TensorTrust: score"]
    assert score["change"] == pytest.approx(7 / 16 / 3)
    assert score["paired"]["mean"] == pytest.approx(7 / 16 / 3)
    assert (score["rows"], score["paired"]["groups"]) == (40, 8)
    assert score["paired"]["low"] > 0
    assert pairs["TensorTrust: hijacking"]["paired"]["mean"] == 0
    assert pairs["RealGuardrails: handwritten"]["rows"] == 10
    assert pairs["RealGuardrails: score"]["paired"] is None  # verdicts are missing
    shown = capsys.readouterr().out
    assert "hierarchy: TensorTrust: score" in shown
    assert "TensorTrust: extraction" not in shown  # a detail


def test_errors_come_before_the_first_request(says_no: Callable[..., str], tmp_path: Path) -> None:
    with served(answers_everything, ["judge"]) as server:
        arguments = ("hierarchy", "--model", "m", "--server", server.url, "--output-dir", tmp_path)
        assert "--tensortrust nowhere: there is no such folder" in says_no(*arguments, "--tensortrust", "nowhere")
        guardrails = write_realguardrails(tmp_path / "guardrails")
        assert "Add --judge NAME --judge-server URL." in says_no(*arguments, "--realguardrails", guardrails)
        judge = ("--judge", "judge", "--judge-server", "nonsense")
        assert "--judge-server" in says_no(*arguments, "--realguardrails", guardrails, *judge)
        for option in (("--judge", "judge"), ("--judge-server", server.url), ("--retries", "2")):
            refusal = says_no(*arguments, "--tensortrust", write_tensortrust(tmp_path / "guards"), *option)
            assert refusal.startswith(f"{option[0]}: a program judges all sets but RealGuardrails.")
        refusal = says_no(*arguments, "--published-max-new-tokens", "64")
        assert refusal.startswith("--published-max-new-tokens: no published set is measured.")
        assert server.asked == []


def answers_in(folder: Path) -> int:
    with sqlite3.connect(folder / "hierarchy.sqlite") as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


def answers_given(server: ScriptedServer) -> int:
    return server.answered.total() - server.answered[FIRST_CONTACT]


def test_killed_runs_lose_nothing_that_was_answered(
    tmp_path: Path, start: Callable[..., multiprocessing.process.BaseProcess]
) -> None:
    """Kill the command while the model answers and while the judge does; the files equal those of a whole run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()

    async def steady(asked: Asked) -> Reply:
        """Give the same reply each time: what was on its way at a kill is asked for again."""
        return await answers_everything(replace(asked, times=0))

    with served(steady, ["judge"]) as server:

        def run(out: Path) -> multiprocessing.process.BaseProcess:
            return start(tmp_path, "hierarchy", *arguments_of(server.url, tmp_path, out))

        process = run(whole)
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "printed").read_text()
        needed, answered_before, lost = len(server.asked), answers_given(server), 0
        models = [asked.body.get("model") for asked in server.asked]
        assert [models[moment] for moment in KILLED_AT] == ["m", "judge"]
        for moment in KILLED_AT:
            enough = needed + moment + lost
            process = run(killed)
            while len(server.asked) < enough and process.is_alive():
                time.sleep(0.0005)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL  # it was in the middle of it
            if (killed / "hierarchy.sqlite").exists():
                lost = answers_given(server) - answered_before - answers_in(killed)
        process = run(killed)
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "printed").read_text()
        # Nothing was answered twice but what was on its way at a kill.
        repeated = answers_given(server) - answered_before - answers_in(killed)
        assert repeated == lost <= len(KILLED_AT) * (CONCURRENCY + CONCURRENCY // 4)
    for name in ("hierarchy_rows.jsonl", "hierarchy.json", "report.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_killed_run_of_a_local_model_continues(
    tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """6 rows of ours and 40 of TensorTrust in batches of 8: a kill at the fourth batch leaves 6 + 16 answers."""
    out = tmp_path / "out"
    arguments = [
        *("hierarchy", "--model", tiny_chat_model, "--settings", "reference", "--rows", "6", "--max-new-tokens", "4"),
        *("--tensortrust", write_tensortrust(tmp_path / "tensortrust"), "--published-max-new-tokens", "4"),
        *("--batch-size", "8", "--output-dir", out),
    ]

    run_until_killed(arguments, tmp_path)
    before = stored_answers(out / "hierarchy.sqlite")
    assert len(before) == 6 + 16
    assert command(*arguments) == 0
    after = stored_answers(out / "hierarchy.sqlite")
    assert len(after) == 46
    assert before < after
    record = json.loads((out / "hierarchy.json").read_text(encoding="utf-8"))
    assert record["tensortrust"]["endings"] == {"cut": 40}
    assert record["tensortrust"]["decoding"] == {"max_tokens": 4, "temperature": 0.0}
