"""scripts/evaluate.py bench with a scripted judge: every figure of bench.json recomputed by other means."""

import json
import statistics
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from bench_runs import DIMENSIONS, bench_row, command, judging, lines, place_of, too_long, write_lines
from scripted_server import Asked, Reply, ScriptedServer, error, said, served

RUNS, RETRIES, RUBRICS = 3, 1, 4


def plan(row: int, rubric: int, time: int) -> Reply | str:
    """Row 0: a try that cannot be read. Row 1: rubric 1 never has a score. Row 2: refused by the server. Row 3: server errors.

    Which of the runs asks first is left to chance, so what all of them get together is what counts.
    """
    if (row, rubric) == (0, 0):
        return ["no verdict", "[RESULT] 4", "[RESULT] 5/5", "[RESULT] 2"][time]
    if (row, rubric) == (1, 1):
        return "I would rather not say."
    if row == 2:
        return too_long()
    if (row, rubric) == (3, 2) and time < 3:
        return [error(429, "busy", headers={"retry-after": "0"}), error(500, "oh"), Reply(body={}, drop=10)][time]
    return f"It is {'so ' * rubric}so.\n[RESULT] {(row + rubric) % 5 + 1}"


ROWS = [bench_row(number) for number in range(5)]
SCORES = {  # what the plan gives to each rubric of the rows that get any
    0: [Fraction(4 + 5 + 2, 3), Fraction(2), Fraction(3), Fraction(4)],
    1: [Fraction(2), None, Fraction(4), Fraction(5)],
    3: [Fraction(4), Fraction(5), Fraction(1), Fraction(2)],
}
OF_ROW = {
    row: sum(result) / len(result)
    for row, all in SCORES.items()
    if (result := [entry for entry in all if entry is not None])
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Asked], str]:
    """A run over five rows, the last without a response: its folder, the judge's requests, and its output."""
    folder = tmp_path_factory.mktemp("bench")
    data = write_lines(folder / "rows.jsonl", ROWS)
    responses = [
        {"system": row["system"], "prompt": row["prompt"], "response": f"Response {number} with [RESULT] 5 in it."}
        for number, row in enumerate(ROWS[:4])
    ]
    answers = write_lines(folder / "answers.jsonl", responses)
    with served(judging(plan), models=["judge"]) as server:
        assert command(*options(server, data, folder / "out"), "--responses", answers) == 0
        return folder / "out", list(server.asked), server.url


def options(server: ScriptedServer, data: Path, output: Path, **changes: Any) -> list[str]:
    settings = {
        "model": "the-model",
        "data": data,
        "output_dir": output,
        "judge": "judge",
        "judge_server": server.url,
        "runs": RUNS,
        "retries": RETRIES,
    } | changes
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text("utf-8"))


def mean(values: list[Fraction]) -> float:
    return float(sum(values) / len(values))


def test_the_score_is_the_mean_over_rows_and_missing_scores_are_counted(done: tuple[Path, list[Asked], str]) -> None:
    folder, asked, _ = done
    result = record(folder)
    assert result["score"] == {
        "mean": pytest.approx(mean(list(OF_ROW.values()))),
        "low": None,  # even the range of three rows holds the median but 3 times in 4
        "high": None,
        "rows": 3,
        "interval": "none: too few",
        "scored": 3,
        "of": 5,
    }
    assert {name: (entry["mean"], entry["scored"], entry["of"]) for name, entry in result["by_source"].items()} == {
        "FLASK": (pytest.approx(mean([OF_ROW[1], OF_ROW[3]])), 2, 2),
        "Koala": (pytest.approx(float(OF_ROW[0])), 1, 3),
    }
    assert result["by_source"]["Koala"]["low"] is None  # one row has no interval
    assert result["missing"] == {
        "rows_without_response": 1,
        "why_no_response": {"no line in --responses": 1},
        "rows_without_score": 2,
        "rows_with_some_rubrics_missing": 1,
        "judgements": 4 * RUBRICS * RUNS,
        # rubric 1 of row 1 in each run; all of row 2
        "judgements_missing": {"unparsable": RUNS, "no answer": RUBRICS * RUNS, "pending": 0},
        "why_no_judgement": {"400 Said: too long a prompt": RUBRICS * RUNS},
        "judge_answers": 12 + 1 + 9 + 2 * RUNS + 12,
        "judge_answers_without_score": {"no score at its end": 1 + 2 * RUNS},
        "judge_answers_cleaned": {},
        "judge_tokens": {"prompt": 7 * 40, "completion": sum(len(text.split()) for text in texts_of(folder))},
        "responses_cut": 0,
        "responses_only_reasoning": 0,
        "responses_empty": 0,
        "responses_ended_otherwise": {},
    }
    assert result["complete"]
    assert len(asked) == 12 + 1 + 9 + 6 + 12 + 12 + 3  # of row 3 three tries were repeated
    assert (result["rows"], result["rows_of_the_data"]) == (5, 5)


def texts_of(folder: Path) -> list[str]:
    return [
        text
        for row in lines(folder / "bench_rows.jsonl")
        for answer in row["answers"]
        for runs in answer["judgements"]
        for entry in runs
        if entry
        for text in entry["texts"]
    ]


def test_scores_by_dimension_are_means_over_rubrics(done: tuple[Path, list[Asked], str]) -> None:
    result = record(done[0])
    for number, dimension in enumerate(DIMENSIONS):
        scores = [all[number] for all in SCORES.values() if all[number] is not None]
        expected = (pytest.approx(mean(scores)), len(scores), 5)
        for entry in (result["by_dimension"][dimension], result["by_subdimension"][f"{dimension}/sub_{number}"]):
            assert (entry["mean"], entry["scored"], entry["of"]) == expected
    assert set(result["by_dimension"]) == set(DIMENSIONS)


def grade_in(text: str) -> int | None:
    """The grade of this plan's texts."""
    return int(text.split("[RESULT] ")[1][0]) if "[RESULT] " in text else None


def test_every_score_of_the_rows_file_follows_from_the_judges_texts(done: tuple[Path, list[Asked], str]) -> None:
    rows = lines(done[0] / "bench_rows.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    by_run: list[list[float]] = [[] for _ in range(RUNS)]
    grades_of_rubrics = []
    for number, row in enumerate(rows):
        assert row["score"] == (pytest.approx(float(OF_ROW[number])) if number in OF_ROW else None)
        (answer,) = row["answers"]
        assert (
            row["response"]
            == answer["response"]
            == (None if number == 4 else f"Response {number} with [RESULT] 5 in it.")
        )
        of_runs: list[list[int]] = [[] for _ in range(RUNS)]
        for rubric, runs in zip(row["rubrics"], answer["judgements"], strict=True):
            grades = []
            for which, entry in enumerate(runs):
                if number == 4:
                    assert entry is None
                    continue
                assert entry["score"] == (grade_in(entry["texts"][-1]) if entry["texts"] else None)
                assert all(grade_in(text) is None for text in entry["texts"][:-1])
                if entry["score"] is not None:
                    grades.append(entry["score"])
                    of_runs[which].append(entry["score"])
            assert rubric["score"] == (pytest.approx(statistics.mean(grades)) if grades else None)
            grades_of_rubrics += [grades] if len(grades) > 1 else []
        for which, result in enumerate(of_runs):
            by_run[which] += [statistics.mean(result)] if result else []
    agreement = record(done[0])["runs"]
    scores = [statistics.mean(result) for result in by_run]
    assert agreement["scores"] == pytest.approx(scores)
    assert agreement["std_of_scores"] == pytest.approx(statistics.stdev(scores))
    assert agreement["std_within_a_rubric"] == pytest.approx(statistics.mean(map(statistics.stdev, grades_of_rubrics)))
    assert agreement["rubrics_with_two_runs"] == 11
    assert agreement["rubrics_with_the_same_words"] == pytest.approx(
        11 / 12
    )  # all that got an answer but row 0, rubric 0
    assert "the runs agree word for word" in (done[0] / "report.md").read_text("utf-8")
    assert agreement["rubrics_in_agreement"] == pytest.approx(10 / 11)


def test_no_request_to_the_judge_holds_the_system_message(done: tuple[Path, list[Asked], str]) -> None:
    _, asked, _ = done
    for entry in asked:
        row, rubric = place_of(entry.prompt)
        body = json.dumps(entry.body)
        assert "Zebra" not in body
        assert [message["role"] for message in entry.body["messages"]] == ["user"]
        for part in (
            f"Question {row}, is it?",
            f"Reference to {row}.",
            f"Response {row} with",
            f"rubric {row}.{rubric}",
        ):
            assert part in entry.prompt
        assert {name: entry.body[name] for name in entry.body if name != "messages"} == {
            "model": "judge",
            "max_tokens": 1024,
            "temperature": 1.0,
            "top_p": 0.9,
        }


def test_the_report_lists_missing_scores_and_deviations(done: tuple[Path, list[Asked], str]) -> None:
    folder, _, _ = done
    report = (folder / "report.md").read_text("utf-8")
    overall = mean(list(OF_ROW.values()))
    assert f"**the-model: {overall:.2f} (n = 3) of 5**" in report
    assert "(n = ...): too few rows for an interval, which needs at least 6." in report
    assert "Missing: 15 of 48 judgements (3 unparsable, 12 no answer)" in report
    assert "2 without a score (left out of the means), 1 of them without a response" in report
    deviations = record(folder)["deviations"]
    assert any("the judge is judge; the paper's is gpt-4-0125-preview" in entry for entry in deviations)
    assert any("the responses come from a file" in entry for entry in deviations)
    assert not any("shown" in entry or "runs" in entry for entry in deviations)
    assert all(entry in report for entry in deviations)
    assert (folder / "bench.png").stat().st_size > 1_000
    assert "![bench](bench.png)" in report
    assert report.count("## Multifaceted Bench") == 1


def grade(row: int, rubric: int, time: int) -> str:
    return f"[RESULT] {(row + rubric) % 5 + 1}"


def test_requests_have_the_papers_settings_and_are_never_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [*ROWS[:2], bench_row(2, system="")])
    with served(judging(grade), models=["judge"]) as server:
        asking = [*options(server, data, tmp_path / "out"), "--server", server.url]
        assert command(*asking) == 0
        asked = list(server.asked)
        files = {
            name: (tmp_path / "out" / name).read_bytes() for name in ("bench.json", "bench_rows.jsonl", "report.md")
        }
        assert command(*asking) == 0
        assert len(server.asked) == len(asked)
        assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
        assert command(*asking, "--no-system", "--output-dir", tmp_path / "without") == 0
        without = server.asked[len(asked) :]
    questions = [entry.body for entry in asked if entry.body["model"] == "the-model"]
    assert [body["messages"] for body in sorted(questions, key=lambda body: body["messages"][-1]["content"])] == [
        [{"role": "system", "content": ROWS[0]["system"]}, {"role": "user", "content": "Question 0, is it?"}],
        [{"role": "system", "content": ROWS[1]["system"]}, {"role": "user", "content": "Question 1, is it?"}],
        [{"role": "user", "content": "Question 2, is it?"}],  # an empty system message is none
    ]
    for body in questions:
        assert {name: body[name] for name in body if name != "messages"} == {
            "model": "the-model",
            "max_tokens": 1024,
            "temperature": 1.0,
            "top_p": 0.9,
            "repetition_penalty": 1.03,
        }
    assert lines(tmp_path / "out" / "bench_rows.jsonl")[1]["response"] == "the-model answers: Question 1, is it?"
    result = record(tmp_path / "out")
    assert result["deviations"] == [
        "the judge's prompt has our own wording (version 2)",
        "the judge is judge; the paper's is gpt-4-0125-preview, and scores of two judges differ",
        "the data has 3 rows, Multifaceted Bench 921",
    ]
    assert result["score"]["mean"] == pytest.approx(
        statistics.mean([(1 + 2 + 3 + 4) / 4, (2 + 3 + 4 + 5) / 4, (3 + 4 + 5 + 1) / 4])
    )
    ablation = [entry.body["messages"] for entry in without if entry.body["model"] == "the-model"]
    assert len(ablation) == 3
    assert all([message["role"] for message in messages] == ["user"] for messages in ablation)
    assert record(tmp_path / "without")["system_message_given"] is False
    assert "the model got no system message (--no-system)" in record(tmp_path / "without")["deviations"]


def test_a_judge_shown_the_system_message_is_labelled_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:2])
    answers = write_lines(
        tmp_path / "a.jsonl", [{"system": row["system"], "prompt": row["prompt"], "response": "r"} for row in ROWS[:2]]
    )
    with served(judging(grade), models=["judge"]) as server:
        asking = [*options(server, data, tmp_path / "out"), "--responses", str(answers)]
        assert command(*asking, "--show-system") == 0
        for entry in server.asked:
            assert ROWS[place_of(entry.prompt)[0]]["system"] in entry.prompt
        shown = capsys.readouterr().out
        assert record(tmp_path / "out")["judge"]["sees_the_system_message"] is True
        assert "the judge was shown the system message" in record(tmp_path / "out")["deviations"]
        for text in (shown, (tmp_path / "out" / "report.md").read_text("utf-8")):
            assert "Deviations from the paper's protocol" in text
            assert "the judge was shown the system message" in text
        assert {row["judge"] for row in lines(tmp_path / "out" / "bench_rows.jsonl")} == {
            "judge (shown the system message)"
        }
        # The same journal, and yet none of those judgements passes for one of the paper's protocol.
        before = len(server.asked)
        assert command(*asking) == 0
        assert len(server.asked) == before + 2 * RUBRICS * RUNS


def test_a_higher_token_limit_or_more_runs_request_only_new_answers(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:2])
    with served(judging(grade), models=["judge"]) as server:
        for runs, expected in ((1, 1 + 2 + 2 * RUBRICS), (3, 2 * 2 * RUBRICS), (2, 0)):
            before = len(server.asked)  # 1 of the first is the first contact with the judge
            assert command(*options(server, data, tmp_path / "out", runs=runs), "--server", server.url) == 0
            assert len(server.asked) - before == expected


@pytest.fixture
def candidates(tmp_path: Path) -> tuple[Path, Path]:
    """Two rows with three candidates each; the second has the highest given score."""
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:2])
    given = [
        {
            "system": row["system"],
            "prompt": row["prompt"],
            "responses": ["<A>", "<B>", "<C>"],
            "scores": [0.1, 0.7, 0.3],
        }
        for row in ROWS[:2]
    ]
    return data, write_lines(tmp_path / "given.jsonl", given)


async def fickle(asked: Asked) -> Reply:
    """Grade <A> always 3, <B> 5 the first time and then 2, <C> always 1."""
    which = asked.prompt.split("### Answer to be graded\n<")[1][0]
    grade = {"A": 3, "B": 5 if asked.times == 0 else 2, "C": 1}[which]
    return said(f"[RESULT] {grade}")


@pytest.mark.parametrize(
    ("pick_by", "score", "picked", "calls"),
    [
        ("first-run", 2.0, 1, 3 + 2),  # <B> had luck in the run that picked; the other runs say what it is worth
        ("all-runs", 3.0, 0, 9),  # <A> and <B> have 3 each, and <A> came first
        ("file", 3.0, 1, 3),  # no other answer is judged
    ],
)
def test_best_of_n_picks_one_and_keeps_all(
    tmp_path: Path, candidates: tuple[Path, Path], pick_by: str, score: float, picked: int, calls: int
) -> None:
    data, given = candidates
    with served(fickle, models=["judge"]) as server:
        asking = options(server, data, tmp_path / "out", best_of=3, pick_by=pick_by, responses=given)
        assert command(*asking) == 0
        assert len(server.asked) == 2 * RUBRICS * calls
    result = record(tmp_path / "out")
    assert result["score"]["mean"] == pytest.approx(score)
    for row in lines(tmp_path / "out" / "bench_rows.jsonl"):
        assert [answer["response"] for answer in row["answers"]] == ["<A>", "<B>", "<C>"]
        assert (row["picked"], row["response"]) == (picked, ["<A>", "<B>", "<C>"][picked])
    best = result["best_of"]
    assert (best["answers"], best["upper_bound"]) == (3, pick_by == "all-runs")
    assert ("upper bound" in (tmp_path / "out" / "report.md").read_text("utf-8")) == (pick_by == "all-runs")
    if pick_by == "first-run":
        assert best["all_answers"]["mean"] == pytest.approx((3 + 5 + 1) / 3)
        assert result["runs"]["numbers"] == [2, 3]
    elif pick_by == "all-runs":
        assert best["all_answers"]["mean"] == pytest.approx((3 + 3 + 1) / 3)
    else:
        assert "all_answers" not in best


def test_best_of_n_requests_n_answers(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:1])

    async def script(asked: Asked) -> Reply:
        return said(f"answer {asked.times}" if asked.body["model"] == "the-model" else "[RESULT] 3")

    with served(script, models=["judge"]) as server:
        assert command(*options(server, data, tmp_path / "out", best_of=3), "--server", server.url) == 0
    (row,) = lines(tmp_path / "out" / "bench_rows.jsonl")
    assert {answer["response"] for answer in row["answers"]} == {"answer 0", "answer 1", "answer 2"}


def test_reasoning_of_the_model_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:2])

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            return said("Hm.</think>[RESULT] 3<|im_end|>")
        return said("<think>secret</think>Open." if "0" in asked.prompt else "<think>secret without an end", "length")

    with served(script, models=["judge"]) as server:
        assert command(*options(server, data, tmp_path / "out"), "--server", server.url) == 0
        assert not any("secret" in entry.prompt for entry in server.asked)
    assert [row["response"] for row in lines(tmp_path / "out" / "bench_rows.jsonl")] == ["Open.", ""]
    missing = record(tmp_path / "out")["missing"]
    assert (missing["responses_cut"], missing["responses_empty"]) == (2, 1)
    assert missing["responses_only_reasoning"] == 1
    judgements = 2 * RUBRICS * RUNS
    assert missing["judge_answers_cleaned"] == {
        "control tokens taken off the end": judgements,
        "reasoning taken out": judgements,
    }
    shown = capsys.readouterr().out
    assert "1 empty (1 of these: reasoning without an end)" in shown
    assert "reasoning without an end, and nothing said: 1 answer (responses 1); raise the token limit" in shown
    assert f"warning: control tokens taken off the end: {judgements} answers (judge {judgements}); " in shown


def test_incomplete_responses_are_scored_and_counted_by_kind(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:4])
    reasons = ("MAX_TOKENS", "SAFETY", "foo", "stop")

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            return said("[RESULT] 3")
        number = int(asked.prompt.partition("Question ")[2][0])
        return said("" if reasons[number] == "stop" else "Half of", reasons[number])

    with served(script) as server:
        assert command(*options(server, data, tmp_path / "out"), "--server", server.url) == 0
    missing = record(tmp_path / "out")["missing"]
    assert (missing["responses_cut"], missing["responses_empty"]) == (1, 1)
    assert missing["responses_ended_otherwise"] == {"ended for an unknown reason (foo)": 1, "refused": 1}
    assert (missing["rows_without_response"], missing["rows_without_score"]) == (0, 0)
    expected = "Responses: 1 cut at the token limit, 1 empty, 1 ended for an unknown reason (foo), 1 refused."
    assert expected in (tmp_path / "out" / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"judge_server": None}, "the judge is reached in one of two ways"),
        ({"batch_out": "b.jsonl"}, "the judge is reached in one of two ways"),
        ({"best_of": 2, "runs": 1}, "no run is left to score"),
        ({"best_of": 2, "pick_by": "file"}, "--pick-by file"),
        ({"against": "nowhere.jsonl"}, "--against nowhere.jsonl: cannot be read: there is no nowhere.jsonl in "),
        ({"output_dir": None}, "--model m: there is no such folder: there is no m in "),
        ({"temperature": -1}, "--temperature -1"),
        ({"judge_top_p": 1.5}, "--judge-top-p 1.5"),
        ({"repetition_penalty": 0}, "--repetition-penalty 0"),
        ({"data": "nowhere.jsonl"}, "there is no nowhere.jsonl"),
        ({"judge_extra": "[1]"}, "must be a JSON object"),
        ({"judge_extra": '{"top_k": NaN}'}, "NaN"),
        ({"judge_extra": '{"messages": []}'}, "--judge-extra: `messages`"),
        ({"judge_extra": '{"n": 3}'}, "--judge-extra: `n`"),
        ({"judge_extra": '{"temperature": 0}'}, "--judge-temperature"),
        ({"good": 9}, "--good 9"),
        ({"pick_by": "all-runs"}, "--best-of"),
        ({"runs": 0}, "--runs 0: found 0. Allowed: "),
        ({"runs": 999_999_999_999}, "--runs 999999999999: found 999999999999. Allowed: "),
        (
            {"best_of": 999_999_999_999, "server": "http://localhost:1/v1"},
            "--best-of 999999999999: found 999999999999. Allowed: ",
        ),
    ],
)
def test_invalid_or_contradictory_settings_are_one_error(
    tmp_path: Path,
    changes: dict[str, Any],
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", ROWS)
    settings = {
        "model": "m", "data": "rows.jsonl", "judge": "judge", "judge_server": "http://localhost:1/v1", "output_dir": "out"
    } | changes  # fmt: skip
    given = {name: value for name, value in settings.items() if value is not None}
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert command(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert error in last


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"judge_key_variable": "NO_SUCH_VARIABLE"}, "set the environment variable NO_SUCH_VARIABLE"),
        ({"judge_server": "localhost:8000"}, "error: --judge-server 'localhost:8000' is not a URL"),
        ({"server": "localhost:8000"}, "error: --server 'localhost:8000' is not a URL"),
        ({"against": "rows.jsonl"}, "no line of bench_rows.jsonl"),
        ({"judge_server": None, "batch_in": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
    ],
)
def test_an_unusable_judge_is_an_error_before_the_model_is_asked(
    tmp_path: Path,
    changes: dict[str, Any],
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    with served(judging(plan), models=["judge"]) as server:
        given = {
            "model": "m", "data": data, "output_dir": "out", "server": server.url, "judge": "judge",
            "judge_server": server.url,
        } | changes  # fmt: skip
        arguments = [
            part for name, value in given.items() if value for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        assert command(*arguments) == 2
        assert not server.asked
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refuses", "status", "expected"),
    [
        ("judge", 401, "name the environment variable that holds it as --judge-key-variable."),
        ("judge", 404, "--judge-server is probably wrong"),
        ("judge", 500, "Is --judge-server right"),
        ("m", 401, "name the environment variable that holds it as --key-variable."),
        ("m", 404, "--server is probably wrong"),
    ],
)
def test_a_servers_error_names_the_option_to_change(
    tmp_path: Path, refuses: str, status: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's own message is quoted unchanged."""
    answers = judging(plan)

    async def script(asked: Asked) -> Reply:
        if asked.path.endswith("/models"):
            return error(status, "no list")
        words = "what base_url and key_variable are is my affair"
        return error(status, words) if asked.body["model"] == refuses else await answers(asked)

    data = write_lines(tmp_path / "rows.jsonl", ROWS[:3])
    with served(script) as server:
        assert command(*options(server, data, tmp_path / "out", model="m"), "--server", server.url) == 2
    _, _, said_last = capsys.readouterr().err.partition("error: ")
    assert expected in said_last
    assert "what base_url and key_variable are is my affair" in said_last
    assert "\n" not in said_last.strip()


def test_the_judge_is_contacted_first_unless_all_responses_are_in_the_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:1])
    with (
        served(judging(lambda row, rubric, time: "[RESULT] 3"), models=["judge"]) as judge,
        served(judging(plan)) as model,
    ):
        asking = [*options(judge, data, tmp_path / "out", model="m", runs=1), "--server", model.url]
        away = [part.replace(judge.url, "http://127.0.0.1:9/v1") for part in asking]
        assert command(*away, "--wait-for-server", "0") == 2
        assert "error: http://127.0.0.1:9/v1 can't be reached (connection refused" in capsys.readouterr().err
        assert not model.asked
        assert command(*asking) == 0
    assert command(*away, "--wait-for-server", "0") == 0  # of both servers, none is there


def test_too_many_responses_are_an_error_and_a_limit_is_reported(
    tmp_path: Path, candidates: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, given = candidates
    with served(judging(grade), models=["judge"]) as server:
        asking: Callable[..., list[str]] = lambda **changes: options(server, data, tmp_path / "out", **changes)  # noqa: E731
        assert command(*asking(responses=given)) == 2
        assert "has 3 responses. Write --best-of 3" in capsys.readouterr().err
        assert command(*asking(limit=1), "--server", server.url) == 0
        shown = capsys.readouterr().out
    assert "1 of 2 rows, not the complete bench" in shown
    assert "(the first 1 of 2: not the complete bench)" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_runs_with_different_texts_raise_no_suspicion_of_greedy_decoding(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS[:1])
    with served(judging(lambda row, rubric, time: f"Thought {time}. [RESULT] 3"), models=["judge"]) as server:
        assert command(*options(server, data, tmp_path / "out"), "--server", server.url) == 0
    assert record(tmp_path / "out")["runs"]["rubrics_with_the_same_words"] == 0
    assert "word for word" not in (tmp_path / "out" / "report.md").read_text("utf-8")
