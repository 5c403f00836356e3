"""scripts/evaluate.py bench with servers that refuse: reasons are reported, and no answer at all is an error."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import FIRST_CONTACT, bench_row, command, judging, lines, place_of, too_long, write_lines
from scripted_server import Asked, Reply, error, said, served

ROWS = [bench_row(number) for number in range(6)]
GRADES = judging(lambda row, rubric, time: f"[RESULT] {1 + (row + rubric) % 5}")


def bench(folder: Path, url: str, *more: str) -> int:
    data = write_lines(folder / "rows.jsonl", ROWS)
    asked = ("--model", "m", "--data", data, "--server", url, "--judge", "judge", "--judge-server", url)
    return command(*asked, "--runs", "2", "--output-dir", folder / "out", *more)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "bench.json").read_text("utf-8"))


async def has_no_system_role(asked: Asked) -> Reply:
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "System role not supported")
    return await GRADES(asked)


def test_a_server_that_refuses_every_prompt_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(has_no_system_role, models=["judge"]) as server:
        assert bench(tmp_path, server.url) == 2
        message = capsys.readouterr().err.partition("error: ")[2]
        assert message.startswith("--model m: none of the 6 prompts got an answer: ")
        assert "System role not supported" in message
        assert "--system-role merge_into_user" in message
        assert "\n" not in message.strip()
        assert not (tmp_path / "out" / "bench.json").exists()
        assert bench(tmp_path, server.url, "--system-role", "merge_into_user") == 0
    assert record(tmp_path)["score"]["scored"] == 6


def test_a_file_without_responses_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_lines(tmp_path / "answers.jsonl", [{**row, "responses": []} for row in ROWS])
    with served(GRADES, models=["judge"]) as server:
        data = write_lines(tmp_path / "rows.jsonl", ROWS)
        asked = ("--model", "m", "--data", data, "--judge", "judge", "--judge-server", server.url)
        assert command(*asked, "--responses", empty, "--output-dir", tmp_path / "out") == 2
        assert not server.asked
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message == f"--responses {empty}: none of the 6 prompts got an answer: no line in --responses.\n"


def test_reasons_for_missing_answers_are_counted_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of six prompts get no answer, for two reasons; the judge refuses one of the other three rows."""

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            is_refused = asked.prompt != FIRST_CONTACT and place_of(asked.prompt)[0] == 0
            return too_long() if is_refused else said("[RESULT] 3")
        number = int(asked.prompt.split()[1].strip(","))
        if number in (1, 2):
            return error(400, "too   many\nzebras")
        return error(400, "no stripes") if number == 3 else said("A stripe.")

    with served(script, models=["judge"]) as server:
        assert bench(tmp_path, server.url) == 0
    shown = capsys.readouterr().out
    missing = record(tmp_path)["missing"]
    (zebras, stripes), (judges,) = missing["why_no_response"].items(), missing["why_no_judgement"].items()
    assert (zebras[1], stripes[1], judges[1]) == (2, 1, 4 * 2)
    assert shown.splitlines()[-1].startswith("warning: 11 answers are missing")
    assert ("too many zebras" in zebras[0], "no stripes" in stripes[0], "too long" in judges[0]) == (True, True, True)
    for text in (shown, (tmp_path / "out" / "report.md").read_text("utf-8")):
        assert f"- no response, 2 times: {zebras[0]}" in text
        assert f"- no response, 1 time: {stripes[0]}" in text
        assert f"- no answer of the judge, 8 times: {judges[0]}" in text
    rows = lines(tmp_path / "out" / "bench_rows.jsonl")
    assert [row["score"] for row in rows] == [None, None, None, None, 3, 3]


def test_a_judge_that_never_answers_is_an_error_and_the_responses_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = [True]

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge" and silent:
            return error(400, "this judge is asleep")
        return await GRADES(asked)

    with served(script, models=["judge"]) as server:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "bench.json").write_text("of an earlier run", encoding="utf-8")
        assert bench(tmp_path, server.url, "--limit", "1") == 2
        message = capsys.readouterr().err.partition("error: ")[2]
        assert message.startswith("--judge judge: none of the 8 judgements got an answer: ")
        assert "this judge is asleep" in message
        assert (tmp_path / "out" / "bench.json").read_text(encoding="utf-8") == "of an earlier run"
        silent.clear()
        asked = len(server.asked)
        assert bench(tmp_path, server.url, "--limit", "1") == 0
        assert {request.body["model"] for request in server.asked[asked:]} == {"judge"}
    assert record(tmp_path)["score"]["scored"] == 1


def test_a_batch_with_only_refusals_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:1])
    answers = write_lines(tmp_path / "answers.jsonl", [{**ROWS[0], "response": "r"}])
    asked = ("--model", "m", "--data", data, "--responses", answers, "--judge", "judge", "--output-dir", tmp_path)
    assert command(*asked, "--batch-out", tmp_path / "batch.jsonl") == 0
    refused = {"status_code": 400, "body": {"error": {"message": "no such judge"}}}
    output = [
        {"custom_id": line["custom_id"], "response": refused, "error": None} for line in lines(tmp_path / "batch.jsonl")
    ]
    capsys.readouterr()
    assert command(*asked, "--batch-in", write_lines(tmp_path / "output.jsonl", output)) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message.startswith("--judge judge: none of the 12 judgements got an answer: 400: no such judge")


def test_messages_use_the_singular_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = bench_row(0, rubric_count=1)
    data = write_lines(tmp_path / "rows.jsonl", [alone])
    given = [{**row, "response": "r"} for row in (alone, bench_row(1))]
    answers = write_lines(tmp_path / "answers.jsonl", given)
    asked = ("--model", "m", "--data", data, "--responses", answers, "--judge", "judge", "--output-dir", tmp_path)
    assert command(*asked, "--runs", "1", "--retries", "0", "--batch-out", tmp_path / "batch.jsonl") == 0
    shown = capsys.readouterr().out
    assert "--responses: 1 line belongs to no row of this run" in shown
    assert "1 question for the judge: " in shown
    assert "**Not finished: 1 judgement is pending; " in shown
    assert "the data has 1 row, Multifaceted Bench 921" in shown
    with served(GRADES, models=["judge"]) as server:
        assert command(*asked, "--runs", "1", "--judge-server", server.url) == 0
    assert "the mean of 1 run over 1 row." in capsys.readouterr().out
