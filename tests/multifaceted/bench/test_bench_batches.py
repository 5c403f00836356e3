"""The judge through files of OpenAI's batch API: same bytes as with a server, missing lines are asked again."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_runs import bench_row, command, lines, place_of, write_lines
from scripted_server import Asked, Reply, said, served

from train.errors import UserError
from train.llm.request import Decoding, Request
from train.multifaceted.bench.batch_api import read_batch, write_batch

ROWS = [bench_row(number) for number in range(3)]


def verdict(prompt: str) -> str:
    """The judge's answer on a rubric, the same every time; one of them has no score."""
    row, rubric = place_of(prompt)
    return "Hm." if (row, rubric) == (1, 2) else f"Well.\n[RESULT] {(row * 2 + rubric) % 5 + 1}"


async def judge(asked: Asked) -> Reply:
    return said(verdict(asked.prompt))


def output_line(line: dict[str, Any], status: int = 200, message: str = "") -> dict[str, Any]:
    """The batch API's output line for a line of its input."""
    body = (
        said(verdict(line["body"]["messages"][-1]["content"])).body
        if status == 200
        else {"error": {"message": message}}
    )
    return {
        "id": f"batch_req_{line['custom_id'][:6]}",
        "custom_id": line["custom_id"],
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": None,
    }


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., int]:
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    responses = [{"system": row["system"], "prompt": row["prompt"], "response": f"To {row['prompt']}"} for row in ROWS]
    answers = write_lines(tmp_path / "answers.jsonl", responses)

    def run(output: str, *arguments: str | Path) -> int:
        given = (
            "--model",
            "m",
            "--data",
            data,
            "--responses",
            answers,
            "--judge",
            "judge",
            "--retries",
            "2",
            "--runs",
            "2",
        )
        return command(*given, "--output-dir", tmp_path / output, *arguments)

    return run


def results(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "bench.json").read_bytes(), (folder / "bench_rows.jsonl").read_bytes()


def test_a_batch_gives_the_bytes_of_a_live_run(
    tmp_path: Path, bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with served(judge, models=["judge"]) as server:
        assert bench("live", "--judge-server", server.url) == 0
        live = [request.body for request in server.asked]
    # Each round asks what the one before left open: the rubric that cannot be read is asked three times in all.
    sent = []
    for number, expected in enumerate((3 * 4 * 2, 2, 2)):
        file = tmp_path / f"round-{number}.jsonl"
        inputs = ["--batch-in", *map(str, tmp_path.glob(f"out-{number - 1}-*.jsonl"))] if number else []
        assert bench("batch", "--batch-out", file, *inputs) == 0
        asked = lines(file)
        assert len(asked) == expected
        assert json.loads((tmp_path / "batch" / "bench.json").read_text())["complete"] is False
        sent += asked
        answered = [output_line(line) for line in asked]
        random.Random(3).shuffle(answered)
        half = len(answered) // 2
        write_lines(tmp_path / f"out-{number}-a.jsonl", answered[:half])
        write_lines(tmp_path / f"out-{number}-b.jsonl", answered[half:])
    assert bench("batch", "--batch-in", *tmp_path.glob("out-2-*.jsonl"), "--batch-out", tmp_path / "none.jsonl") == 0
    assert "wrote nothing" in capsys.readouterr().out
    assert not (tmp_path / "none.jsonl").exists()
    assert results(tmp_path / "batch") == results(tmp_path / "live")
    # The very requests of the live run, in the API's own form.
    assert Counter(json.dumps(line["body"], sort_keys=True) for line in sent) == Counter(
        json.dumps(body, sort_keys=True) for body in live
    )
    assert {(line["method"], line["url"]) for line in sent} == {("POST", "/v1/chat/completions")}
    assert len({line["custom_id"] for line in sent}) == len(sent)
    assert "Zebra" not in json.dumps(sent)


def test_missing_answers_of_a_batch_are_counted_and_written_again(
    tmp_path: Path, bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.jsonl"
    assert bench("out", "--batch-out", first) == 0
    asked = {line["custom_id"]: line for line in lines(first)}
    of_row = {id: place_of(line["body"]["messages"][0]["content"]) for id, line in asked.items()}
    gone = [id for id in asked if of_row[id] == (0, 0)]  # both runs: no line at all
    too_long = [id for id in asked if of_row[id] == (0, 1)]  # refused for good
    expired, overloaded = (id for id in asked if of_row[id] == (2, 0))
    good = [id for id in asked if of_row[id] not in ((0, 0), (0, 1), (2, 0))]
    errors = [output_line(asked[id], 400, "maximum context length") for id in too_long]
    errors.append(output_line(asked[overloaded], 500, "server error"))
    errors.append({"custom_id": expired, "response": None, "error": {"code": "batch_expired", "message": "it expired"}})
    stranger = output_line({"custom_id": "ab" * 20, "body": {"messages": [{"content": "Is criterion 0.0 met?"}]}})
    output = write_lines(tmp_path / "output.jsonl", [stranger, *(output_line(asked[id]) for id in good)])
    error_file = write_lines(tmp_path / "errors.jsonl", errors)
    capsys.readouterr()
    again = tmp_path / "again.jsonl"
    assert bench("out", "--batch-in", output, error_file, "--batch-out", again) == 0
    shown = capsys.readouterr().out
    assert "1 answer belongs to none of these questions" in shown
    assert "1 failed, and are asked again: it expired" in shown
    assert "1 failed, and are asked again: server error" in shown
    wanted = {line["custom_id"] for line in lines(again)}
    assert {*gone, expired, overloaded} < wanted
    assert wanted.isdisjoint(too_long)
    second_tries = wanted - {*gone, expired, overloaded}
    assert len(second_tries) == 2  # of the rubric that cannot be read
    assert second_tries.isdisjoint(asked)
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["complete"] is False
    assert record["missing"]["judgements_missing"] == {"unparsable": 0, "no answer": 2, "pending": 6}
    assert "**Not finished: 6 judgements are pending" in shown
    scores = [row["score"] for row in lines(tmp_path / "out" / "bench_rows.jsonl")]
    assert scores[0] == pytest.approx((3 + 4) / 2)  # of the two rubrics that are there
    assert record["score"]["scored"] == 3


def test_best_of_n_needs_one_batch_to_pick_and_one_to_score(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:2])
    given = [{"system": row["system"], "prompt": row["prompt"], "responses": ["1", "4", "2"]} for row in ROWS[:2]]
    answers = write_lines(tmp_path / "answers.jsonl", given)

    async def by_answer(asked: Asked) -> Reply:
        return said(f"[RESULT] {asked.prompt.split('### Answer to be graded')[1].strip()[0]}")

    def asking(output: str, *arguments: str | Path) -> int:
        options = ("--model", "m", "--data", data, "--responses", answers, "--best-of", "3", "--judge", "judge")
        return command(*options, "--output-dir", tmp_path / output, *arguments)

    with served(by_answer, models=["judge"]) as server:
        assert asking("live", "--judge-server", server.url) == 0
    inputs: list[str | Path] = []
    for number, (expected, about) in enumerate([(2 * 3 * 4, {"1", "4", "2"}), (2 * 4 * 2, {"4"})]):
        file = tmp_path / f"round-{number}.jsonl"
        assert asking("batch", "--batch-out", file, *inputs) == 0
        questions = [line["body"]["messages"][0]["content"] for line in lines(file)]
        candidates = [question.split("### Answer to be graded")[1].strip()[0] for question in questions]
        assert (len(candidates), set(candidates)) == (expected, about)
        output = [
            {
                "custom_id": line["custom_id"],
                "response": {"status_code": 200, "body": said(f"[RESULT] {candidate}").body},
                "error": None,
            }
            for line, candidate in zip(lines(file), candidates, strict=True)
        ]
        inputs = ["--batch-in", write_lines(tmp_path / f"out-{number}.jsonl", output)]
    assert asking("batch", *inputs) == 0
    assert results(tmp_path / "batch") == results(tmp_path / "live")
    assert json.loads((tmp_path / "live" / "bench.json").read_text())["score"]["mean"] == 4


def test_an_existing_batch_file_is_never_overwritten(
    tmp_path: Path, bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "batch.jsonl"
    assert bench("out", "--batch-out", file) == 0
    before = file.read_bytes()
    assert bench("out", "--batch-out", file) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.read_bytes() == before


def requests(count: int) -> dict[bytes, Request]:
    requests = [
        Request("s", [{"role": "user", "content": f"question {number:03}"}], Decoding(8)) for number in range(count)
    ]
    return {request.key("m"): request for request in requests}


def test_batch_files_respect_the_limits_of_the_api(tmp_path: Path) -> None:
    asked = requests(10)
    (whole,) = write_batch(asked, "m", tmp_path / "whole.jsonl")
    by_number = write_batch(asked, "m", tmp_path / "number.jsonl", max_requests=4)
    assert [path.name for path in by_number] == ["number-1.jsonl", "number-2.jsonl", "number-3.jsonl"]
    assert [len(lines(path)) for path in by_number] == [4, 4, 2]
    size = len(whole.read_bytes()) // 10
    by_size = write_batch(asked, "m", tmp_path / "size.jsonl", max_bytes=3 * size)
    assert [path.stat().st_size for path in by_size] == [3 * size, 3 * size, 3 * size, size]
    for parts in (by_number, by_size):
        assert b"".join(path.read_bytes() for path in parts) == whole.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_batch(asked, "m", tmp_path / "number.jsonl", max_requests=4)


@pytest.mark.parametrize(
    "line",
    ["no JSON", '{"custom_id": "row 1", "response": {}}', '{"custom_id": "ab"}', "[]", '{"custom_id": 3, "error": {}}'],
)
def test_a_file_that_is_not_a_batch_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "output.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"output\.jsonl:2: that is no line of a batch's output"):
        read_batch([path])
    with pytest.raises(UserError, match="cannot be read"):
        read_batch([tmp_path / "nowhere.jsonl"])


def test_an_answer_takes_precedence_over_an_error_and_garbage_is_asked_again(tmp_path: Path) -> None:
    good = output_line({"custom_id": "ab", "body": {"messages": [{"content": "Is criterion 0.0 met?"}]}})
    bad = {"custom_id": "ab", "response": {"status_code": 400, "body": {"error": {"message": "no"}}}}
    garbage = {"custom_id": "cd", "response": {"status_code": 200, "body": {"choices": []}}}
    for order in ([good, bad], [bad, good]):
        batch = read_batch([write_lines(tmp_path / "output.jsonl", [*order, garbage])])
        assert batch.answers.keys() == {b"\xab"}
        assert not batch.errors
        assert batch.failed == {"status 200": 1}


def test_empty_or_broken_answers_of_a_batch_are_asked_again(tmp_path: Path) -> None:
    def line(id: str, text: str, finish_reason: str) -> dict[str, Any]:
        choice = {"message": {"content": text}, "finish_reason": finish_reason}
        return {"custom_id": id, "response": {"status_code": 200, "body": {"choices": [choice]}}}

    answers = [line("aa", "[RESULT] 4", "abort"), line("bb", "", "stop"), line("cc", "[RESULT] 4", "MAX_TOKENS")]
    batch = read_batch([write_lines(tmp_path / "output.jsonl", answers)])
    assert {key: answer.cut for key, answer in batch.answers.items()} == {b"\xcc": True}
    assert batch.failed == {
        "the server broke the answer off (finish_reason abort)": 1,
        "an empty answer (finish_reason stop)": 1,
    }
