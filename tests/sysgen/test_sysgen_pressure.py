"""SYSGEN's rows under pressure: rows and counts against a plain loop over the requests, kills, and settings."""

import json
import multiprocessing
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killed_processes import after_a_moment, kill_at_requests, killed_afterwards
from pressured_answers import Log, question, reference
from scripted_server import Asked, Reply, Script, error, said, served
from sysgen_runs import EIGHT, configuration, lines, run_file, run_with

from train.data.sources.source import read_conversations
from train.errors import UserError
from train.recipe import Source
from train.sysgen.config import load_config
from train.sysgen.run import run

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["train.sysgen.run"])

SEED = 100
ANSWER = {"answer": {"seed": SEED}}


def row_of(number: int) -> dict[str, Any]:
    """Return a source row; every ninth has a second exchange."""
    numbers = [number, number + 100] if number % 9 == 4 else [number]
    return {
        "messages": [
            {"role": role, "content": text}
            for each in numbers
            for role, text in (("user", question(each)), ("assistant", reference(each)))
        ]
    }


def author(log: Log) -> Script:
    """Return a script that writes one message per row and answers by the log."""

    async def script(asked: Asked) -> Reply:
        if asked.prompt.startswith("The next conversation"):
            number = re.findall(r"number \[(\d+)\]", asked.prompt)[-1]
            return said(f"<<Role>>You are a guide of group <{int(number) % 100}>.<</Role>>")
        if "Judge for each of the eight" in asked.prompt:
            return said("\n".join(f"<<{tag}>>: Good" for tag in EIGHT))
        system, turn = asked.body["messages"][0]["content"], asked.prompt
        row = int(re.findall(r"<(\d+)>", system)[0])
        numbers = re.findall(r"\[(\d+)\]", turn)
        number = int(numbers[-1]) if numbers else row
        if system == f"You are a guide of group <{row}>.":
            return log.plain(row, asked, number)
        return log.answer(row, asked, number, asked.body["seed"] - SEED)

    return script


def compare_with_log(folder: Path, log: Log, count: int, setting: str, twins: bool) -> dict[str, Any]:
    """Compare rows and counts of a run, all of whose rows were drawn for one setting, with a loop over the log."""
    written = lines(folder / "out" / "data" / "rows.jsonl")
    facts = json.loads((folder / "out" / "report.json").read_text("utf-8"))["pressure"]["settings"]
    expected: list[tuple[list[dict[str, str]], str | None]] = []
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for number in range(count):
        conversations, bad = log.conversations(number)
        refused += bad
        for conversation in conversations:
            is_plain = conversation[0]["content"] == f"You are a guide of group <{number}>."
            name = None if is_plain else "aligned" if conversation is not conversations[0] else setting
            expected.append((conversation, name))
            counts[name or "plain"] += 1
    assert [(row["messages"], row["sysgen"].get("pressure", {}).get("setting")) for row in written] == expected
    assert facts[setting]["rows"] == count
    assert facts[setting]["kept"] == counts[setting]
    assert sum(facts[setting]["given_up"].values()) == counts["plain"] == count - counts[setting]
    of_twins = facts.get("aligned", {"rows": 0, "kept": 0, "given_up": {}, "refused_answers": {}})
    assert of_twins["rows"] == (counts[setting] if twins else 0)
    assert of_twins["kept"] == counts["aligned"]
    assert sum(of_twins["given_up"].values()) == of_twins["rows"] - counts["aligned"]
    assert Counter(facts[setting]["refused_answers"]) + Counter(of_twins["refused_answers"]) == refused
    for row in written:
        if pressure := row["sysgen"].get("pressure"):
            constraints = row["sysgen"]["constraints"]
            assert [pressure["constraint_text"]] == [constraint["text"] for constraint in constraints or [{"text": ""}]]
            assert pressure["constraint_text"] in row["messages"][0]["content"]
            assert pressure["secret"] in row["messages"][0]["content"]
    return facts


@pytest.mark.parametrize("setting", ["conflict", "injected", "extraction", "permitted", "turns"])
def test_rows_and_counts_equal_those_of_a_plain_loop_over_the_requests(tmp_path: Path, setting: str) -> None:
    count, log = 40, Log()
    rows = [row_of(number) for number in range(count)]
    settings: dict[str, Any] = {"pressure": {setting: 1.0}, **ANSWER}
    done, _ = run_with(author(log), tmp_path, rows, **settings)
    if setting == "turns":  # the first row has no earlier one
        written = lines(tmp_path / "out" / "data" / "rows.jsonl")
        assert "pressure" not in written[0]["sysgen"]
        check_further_questions(tmp_path)
    check_lengths(tmp_path, rows)
    facts = compare_with_log(tmp_path, log, count, setting, twins=setting == "conflict")
    assert 0 < facts[setting]["kept"] < count
    reasons = facts[setting]["refused_answers"]
    assert reasons.keys() >= {"does not answer the question", "cut at the token limit"}
    if setting == "extraction":
        assert "reveals the secret" in reasons
    if setting == "permitted":
        expected = {"does not have the form that the user chose", "does not tell the code that may be shared"}
        assert reasons.keys() >= expected
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"| {setting} | {count} | {facts[setting]['kept']} |" in report
    twins = f"; {facts['aligned']['kept']} aligned twins beside them" if setting == "conflict" else ""
    assert done.stats.summary("1s")[1] == f"under pressure: {setting} {facts[setting]['kept']} of {count}{twins}"


def check_lengths(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Check that the lengths of new answers are those of the answers to the data's own turns."""
    original = new = 0
    for row in lines(folder / "out" / "data" / "rows.jsonl"):
        if row["sysgen"].get("pressure", {}).get("setting") == "aligned":
            continue
        source = rows[int(row["sysgen"]["source"].rpartition(":")[2]) - 1]["messages"]
        own = [turn["content"] for turn in source if turn["role"] == "assistant"]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        original += sum(map(len, own))
        new += sum(map(len, answers[: len(own)]))
    characters = json.loads((folder / "out" / "report.json").read_text("utf-8"))["characters"]
    assert (characters["original_answers"], characters["new_answers"]) == (original, new)


def check_further_questions(folder: Path) -> None:
    """Check that the turns after a row's own are questions of earlier rows, and that half of the rows push back."""
    lengths: Counter[int] = Counter()
    pushed_back: Counter[bool] = Counter()
    for row in lines(folder / "out" / "data" / "rows.jsonl"):
        if "pressure" not in row["sysgen"]:
            continue
        number = int(row["sysgen"]["source"].rpartition(":")[2]) - 1
        asked = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        numbers = [int(re.findall(r"\[(\d+)\]", turn)[0]) for turn in asked]
        own = [number, number + 100] if number % 9 == 4 else [number]
        further = numbers[len(own) :]
        assert numbers == own + further
        assert set(further) <= set(range(number))
        assert len(set(further)) == len(further)
        lengths[len(further)] += 1
        pushes_back = [turn != question(each) for turn, each in zip(asked, numbers, strict=True)]
        assert not pushes_back[0]
        assert sum(pushes_back) == (row["sysgen"]["pressure"]["tactic"] != "plain")
        pushed_back[any(pushes_back)] += 1
    assert {1, 2, 3} <= lengths.keys() <= {1, 2, 3, 4}
    assert min(pushed_back[True], pushed_back[False]) > 0


def test_kills_give_the_same_bytes_and_repeat_no_journaled_request(tmp_path: Path) -> None:
    count, kills, rng = 45, 2, random.Random(3)
    shares = {"conflict": 0.3, "injected": 0.1, "extraction": 0.2, "permitted": 0.2, "turns": 0.1}
    changes: dict[str, Any] = {"pressure": shares, **ANSWER}
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row_of(number)) + "\n" for number in range(count)), encoding="utf-8")
    whole = tmp_path / "whole"
    whole.mkdir()
    with served(author(Log())) as server:
        run(load_config(configuration(whole, server.url, source, **changes)))
        requests = len(server.asked)
        bodies = Counter(json.dumps(asked.body) for asked in server.asked)
        assert max(bodies.values()) == 1  # nothing is asked twice
    facts = json.loads((whole / "out" / "report.json").read_text("utf-8"))["pressure"]["settings"]
    assert facts.keys() == {*shares, "aligned"}
    answer = author(Log())

    with served(after_a_moment(answer)) as server, killed_afterwards(processes) as start:
        path = configuration(tmp_path, server.url, source, **changes)
        moments = sorted(rng.sample(range(1, requests), kills))
        assert sum(1 for _ in kill_at_requests(moments, server, partial(start, run_file, path))) == kills
        run_file(path)
        again = len(server.asked)
        run_file(path)
        assert len(server.asked) == again
        repeated = server.answered.total() - requests
    for name in ("data/rows.jsonl", "left_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    counted = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["pressure"]["settings"]
    assert counted == facts
    assert repeated <= kills * (16 + 4)  # as in the test of runs without pressure


def test_the_trainer_reads_the_rows_of_both_formats(tmp_path: Path) -> None:
    read = []
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        rows = [row_of(number) for number in range(15)]
        pressure = {"conflict": 0.5, "turns": 0.5}
        run_with(author(Log()), folder, rows, pressure=pressure, output={"format": format}, **ANSWER)
        read.append([row.messages for _, row in read_conversations(Source(path=str(folder / "out" / "data")))])
    assert read[0] == read[1] == [row["messages"] for row in lines(tmp_path / "jsonl" / "out" / "data" / "rows.jsonl")]
    assert any(len(messages) > 5 for messages in read[0])


def test_without_twins_and_without_pressure_there_are_no_further_rows(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(12)]
    run_with(author(Log()), tmp_path, rows, pressure={"conflict": 1.0, "aligned_twins": False}, **ANSWER)
    assert len(lines(tmp_path / "out" / "data" / "rows.jsonl")) == 12
    run_with(author(Log()), tmp_path, rows, **ANSWER)
    written = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert len(written) == 12
    assert not any("pressure" in row["sysgen"] for row in written)
    assert "pressure" not in json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))


def test_a_twin_whose_answer_ignores_the_message_as_the_judge_sees_it_is_left_out(tmp_path: Path) -> None:
    answer = author(Log())
    judged: list[str] = []

    async def script(asked: Asked) -> Reply:
        if not asked.prompt.startswith("An assistant was given"):
            return await answer(asked)
        judged.append(asked.prompt)
        return said("No" if len(judged) % 2 == 0 else "Yes")

    changes = {"servers": [{"base_url": "", "concurrency": 1}]}  # one row after another
    with served(script) as server:
        changes["servers"][0]["base_url"] = server.url
        source = tmp_path / "source.jsonl"
        source.write_text(json.dumps(row_of(0)) + "\n" + json.dumps(row_of(5)) + "\n", encoding="utf-8")
        path = configuration(
            tmp_path, server.url, source, pressure={"conflict": 1.0}, gates={"judge": True}, **changes, **ANSWER
        )
        done = run(load_config(path, ["data.limit=1"]))
    assert len(judged) == 2
    assert [row["sysgen"]["pressure"]["setting"] for row in lines(tmp_path / "out" / "data" / "rows.jsonl")] == [
        "conflict"
    ]
    assert done.stats.facts()["pressure"]["settings"]["aligned"]["given_up"] == {
        "gate: the answer ignores the system message": 1
    }


def test_a_prompt_that_the_server_refuses_leaves_the_plain_row(tmp_path: Path) -> None:
    answer = author(Log())

    async def filters(asked: Asked) -> Reply:
        if asked.body["messages"][0]["role"] != "system" or asked.body["messages"][0]["content"].endswith(">."):
            return await answer(asked)  # without pressure
        return error(400, "The prompt was filtered.", code="content_filter")

    done, _ = run_with(
        filters, tmp_path, [row_of(number) for number in range(12)], pressure={"conflict": 1.0}, **ANSWER
    )
    written = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert len(written) == 12
    assert not any("pressure" in row["sysgen"] for row in written)
    assert done.stats.facts()["pressure"]["settings"]["conflict"]["given_up"] == {
        "the server refuses the prompt, as too long or by a filter": 12
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pressure": {"conflict": 0.7, "turns": 0.4}}, "pressure: the shares add up to 1.1. They must add up to 1"),
        ({"pressure": {"conflict": 0.1}, "answers": "original"}, "pressure: not possible with `answers: original`"),
        ({"pressure": {"turns": 0.1}, "message": "common"}, "pressure: not possible with `message: common`"),
        ({"pressure": {"conflct": 0.1}}, "pressure.conflct: unknown key. Did you mean `pressure.conflict`?"),
        ({"pressure": {"conflict": 2}}, "pressure.conflict: found 2. Allowed: a number >= 0 and <= 1."),
    ],
)
def test_settings_that_contradict_each_other_are_an_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(configuration(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "source.jsonl", **changes))
