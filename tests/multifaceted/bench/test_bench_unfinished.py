"""Incomplete bench runs: a judge that refuses, failed batches, comparisons of unfinished scores."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import bench_row, command, judging, lines, place_of, write_lines
from scripted_server import Asked, Reply, said, served

from train.errors import UserError
from train.evaluation.compare import compare_results
from train.evaluation.results import read_results
from train.multifaceted.bench.batch_api import read_batch
from train.multifaceted.bench.pairwise import compare_pairwise

ROWS = [bench_row(number, rubric_count=2) for number in range(2)]


def bench(folder: Path, *more: str | Path, retries: int = 0) -> int:
    """The bench over two rows of two rubrics, with answers from a file."""
    data = write_lines(folder / "rows.jsonl", ROWS)
    answers = write_lines(folder / "answers.jsonl", [{**row, "response": "r"} for row in ROWS])
    asked = ("--model", "m", "--data", data, "--responses", answers, "--judge", "judge", "--runs", "1")
    return command(*asked, "--retries", str(retries), "--output-dir", folder / "out", *more)


def judged(folder: Path, *replies: Reply, retries: int = 0) -> int:
    """The same with a judge that gives these replies to each question, one after another."""

    def say(row: int, rubric: int, time: int) -> Reply:
        return replies[min(time, len(replies) - 1)]

    with served(judging(say), models=["judge"]) as server:
        return bench(folder, "--judge-server", server.url, retries=retries)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "bench.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("reply", "kind", "expected"),
    [
        (said("", "content_filter"), "refused", "use another judge, or turn the filter off."),
        (said(None, refusal="I will not grade this."), "refused", "use another judge, or turn the filter off."),
        (said("[RESULT] 4", "SAFETY"), "refused", "use another judge, or turn the filter off."),
        (said("[RESULT] 4", "odd_reason"), "unfinished", "See in the log of the judge's server"),
        (said("It is", "length"), "unfinished", "Raise --judge-max-tokens (or max_completion_tokens in --judge-extra)"),
    ],
)
def test_a_judge_without_a_finished_judgement_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reply: Reply, kind: str, expected: str
) -> None:
    assert judged(tmp_path, reply) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith(f"--judge judge: none of the 4 judgements has a score: 4 {kind}. Its answers: 4 ")
    assert expected in error
    assert "ends with [RESULT]" not in error
    assert record(tmp_path)["missing"]["judgements_missing"] == {
        "unparsable": 0, "no answer": 0, "pending": 0, kind: 4
    }  # fmt: skip
    assert f"4 {kind}" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_one_complete_answer_of_the_judge_turns_the_error_into_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(tmp_path, said("", "content_filter"), said("Hm."), retries=1) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: --judge judge: 4 of 4 verdicts could not be read")
    assert "4 no score at its end, 4 refused" in last
    assert "turn the filter off" in last
    assert "ends with [RESULT]" in last


def test_scores_of_a_later_attempt_raise_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(tmp_path, said("Hm."), said("Well."), said("[RESULT] 3"), retries=2) == 0
    assert "could not be read" not in capsys.readouterr().out
    assert record(tmp_path)["score"]["scored"] == 2


def test_a_refused_response_is_not_counted_as_empty(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            return said("[RESULT] 1")
        return said(None, refusal="No.") if "Question 0" in asked.prompt else said("", "content_filter")

    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    with served(script, models=["judge"]) as server:
        servers = ("--server", server.url, "--judge", "judge", "--judge-server", server.url)
        assert command("--model", "m", "--data", data, *servers, "--runs", "1", "--output-dir", tmp_path / "out") == 0
    missing = record(tmp_path)["missing"]
    assert (missing["responses_empty"], missing["responses_ended_otherwise"]) == (0, {"refused": 2})


# Batches


def batch_line(line: dict[str, Any], status: int, message: str = "") -> dict[str, Any]:
    content = said(f"[RESULT] {1 + sum(place_of(line['body']['messages'][0]['content']))}").body
    body = content if status == 200 else {"error": {"message": message}}
    return {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 429, 500])
def test_a_question_with_an_unrelated_error_is_asked_again(tmp_path: Path, status: int) -> None:
    question = {"custom_id": "ab", "body": {"messages": [{"content": "Is criterion 0.0 met?"}]}}
    path = write_lines(tmp_path / "errors.jsonl", [batch_line(question, status, "The model `j` does not exist")])
    result = read_batch([path])
    assert (len(result.errors), result.failed.total()) == (0, 1)


def test_refused_lines_are_written_again_as_the_error_advises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--batch-out", tmp_path / "first.jsonl") == 0
    asked = lines(tmp_path / "first.jsonl")
    errors = write_lines(tmp_path / "errors.jsonl", [batch_line(line, 400, "no such shape") for line in asked])
    capsys.readouterr()
    assert bench(tmp_path, "--batch-in", errors) == 2
    expected = capsys.readouterr().err
    assert "leave out the file that holds them, and a new --batch-out writes these questions again." in expected
    assert "the same command" not in expected
    assert bench(tmp_path, "--batch-out", tmp_path / "second.jsonl") == 0
    assert lines(tmp_path / "second.jsonl") == asked
    # Some refused, some answered: the warning says the same.
    some = write_lines(tmp_path / "some.jsonl", [batch_line(asked[0], 400, "no"), *(batch_line(line, 200) for line in asked[1:])])  # fmt: skip
    capsys.readouterr()
    assert bench(tmp_path, "--batch-in", some) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: 1 answer is missing")
    assert "a new --batch-out writes these questions again" in last
    assert "asks a server" not in last


# Comparisons


def result(id: str, *scores: float | None, pending: int = 0) -> dict[str, Any]:
    present = [score for score in scores if score is not None]
    judgements = [[{"score": None, "texts": [], "missing": "pending"}] for _ in range(pending)]
    return {
        "id": id, "system": "s", "prompt": f"prompt {id}", "judge": "j",
        "score": sum(present) / len(present) if present else None,
        "rubrics": [{"criteria": f"c{number}", "score": score} for number, score in enumerate(scores)],
        "answers": [{"response": "r", "judgements": judgements}],
    }  # fmt: skip


def test_rows_are_compared_on_their_shared_rubrics(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first.jsonl", [
        result("a", 5, None, None, None, pending=3), result("b", 2, 2, 2, 2), result("c", None, 5, pending=1),
    ])  # fmt: skip
    other = write_lines(tmp_path / "other.jsonl", [
        result("a", 5, 1, 1, 1), result("b", 3, 3, 3, 3), result("c", 1, None),
    ])  # fmt: skip
    comparison = compare_pairwise(first, other, names=("A", "B"))
    # a: 5 and 5 on the one rubric of both; b: 2 and 3; c: no rubric of both.
    assert comparison.counts == {"win of the first": 0, "win of the second": 1, "both good": 1, "both bad": 0}
    assert (comparison.rows, comparison.without_score, comparison.difference.mean) == (2, 1, pytest.approx(-0.5))
    assert comparison.notes[-2:] == [
        "A is not finished: 4 judgements pending; 1 row scored by 1 of its 2 rubrics; "
        "1 row scored by 1 of its 4 rubrics",
        "B has 1 row scored by 1 of its 2 rubrics (compared by the rubrics scored in both)",
    ]
    assert "Skipped: 1 row without a score in one of them." in comparison.markdown()


def test_an_unfinished_run_is_noted_and_a_run_without_scores_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A has a score for one rubric of the first row, B for all four: on the shared rubric they are equal."""
    for name, given in (("a", 1), ("b", 4)):
        (tmp_path / name).mkdir()
        assert bench(tmp_path / name, "--batch-out", tmp_path / f"{name}.jsonl") == 0
        answered = [batch_line(line, 200) for line in lines(tmp_path / f"{name}.jsonl")][:given]
        capsys.readouterr()
        with pytest.raises(UserError, match=r"no row has a score.*is not finished: 4 judgements pending.*--batch-in"):
            read_results(tmp_path / name / "out")
        assert bench(tmp_path / name, "--batch-in", write_lines(tmp_path / f"{name}-out.jsonl", answered)) == 0
    result = compare_results(read_results(tmp_path / "a" / "out"), read_results(tmp_path / "b" / "out"))
    assert "bench: A is not finished: 3 judgements pending; 1 row scored by 1 of its 2 rubrics" in result.notes
    score = next(pair for pair in result.pairs if pair.name == "score")
    assert (score.rows, score.difference and score.difference.mean) == (1, 0)
    # A first batch that is to be compared waits for its answers.
    against = ("--against", tmp_path / "b" / "out" / "bench_rows.jsonl")
    (tmp_path / "c").mkdir()
    assert bench(tmp_path / "c", "--batch-out", tmp_path / "c.jsonl", *against) == 0
    assert "compared once the judge has answered" in capsys.readouterr().out


# Secrets and options


@pytest.mark.parametrize(
    ("option", "value", "variable"),
    [
        ("--judge-extra", {"api_key": "sk-1234"}, "--judge-key-variable"),
        ("--judge-extra", {"extra_headers": {"Authorization": "Bearer sk-1234"}}, "--judge-key-variable"),
        ("--extra", {"routes": [{"apiKey": "sk-1234"}]}, "--key-variable"),
        ("--extra", {"auth_token": "sk-1234"}, "--key-variable"),
    ],
)
def test_a_secret_in_a_request_field_is_refused_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: dict[str, Any], variable: str
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    servers = ("--server", "http://127.0.0.1:9/v1", "--judge", "j", "--judge-server", "http://127.0.0.1:9/v1")
    given = ("--model", "m", "--data", data, *servers, "--output-dir", tmp_path / "out")
    assert command(*given, option, json.dumps(value)) == 2
    shown = "".join(capsys.readouterr())
    assert f"error: {option}: `{next(iter(value))}`: requests hold no secrets here" in shown
    assert f"name the variable by {variable}." in shown
    assert "sk-1234" not in shown
