"""Pairwise comparison on shared rows: outcomes, shares and the test, computed by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import bench_row, command, judging, lines, write_lines
from scripted_server import served

from train.errors import UserError
from train.multifaceted.bench.judging import PROMPT_VERSION
from train.multifaceted.bench.pairwise import compare_pairwise, pairwise_outcome
from train.multifaceted.bench.protocol import PAPERS_RESPONSES, JudgeSettings, Protocol, protocol_of, settings_of


def result(id: str, score: float | None, **more: Any) -> dict[str, Any]:
    rubrics = [{"criteria": "is it?", "score": score}]
    return {"id": id, "system": "s", "prompt": f"prompt {id}", "judge": "j", "score": score, "rubrics": rubrics} | more


FIRST = [("a", 4.5), ("b", 3.0), ("c", 4.0), ("d", 2.5), ("e", None), ("f", 5.0), ("g", 3.25), ("h", 1.0)]
SECOND = [("h", 3.0), ("g", 3.0), ("f", 2.0), ("e", 4.0), ("d", 2.5), ("c", 4.0), ("b", 3.5), ("x", 5.0), ("y", 1.0)]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name, rows in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "bench_rows.jsonl", [result(*row) for row in rows])
    return tmp_path / "one" / "bench_rows.jsonl", tmp_path / "two" / "bench_rows.jsonl"


def test_outcomes_of_shared_rows(files: tuple[Path, Path]) -> None:
    comparison = compare_pairwise(*files)
    # b: second; c: a tie at 4; d: a tie at 2.5; f and g: first; h: second. e has no score in the first, a, x, y are alone.
    assert comparison.names == ("one", "two")
    assert comparison.rows == 6
    assert comparison.counts == {"win of the first": 2, "win of the second": 2, "both good": 1, "both bad": 1}
    assert (comparison.only_first, comparison.only_second, comparison.without_score) == (1, 2, 1)
    assert {name: share.mean for name, share in comparison.shares.items()} == pytest.approx(
        {"win of the first": 2 / 6, "win of the second": 2 / 6, "both good": 1 / 6, "both bad": 1 / 6}
    )
    differences = [-0.5, 0, 0, 3, 0.25, -2]
    assert comparison.difference.mean == pytest.approx(sum(differences) / 6)
    # The test flips signs by chance; here all 64 ways are gone through.
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    exact = sum(total >= abs(sum(differences)) - 1e-9 for total in sums) / 64
    assert comparison.difference.p == pytest.approx(exact, abs=0.02)
    # A share of 2 in 6: at its ends, as true shares, 2 in 6 is 1.96 standard errors away.
    share = comparison.shares["win of the first"]
    for end in (share.low, share.high):
        assert abs(2 / 6 - end) / (end * (1 - end) / 6) ** 0.5 == pytest.approx(1.96, abs=1e-4)
    assert share.low < 2 / 6 < share.high
    assert "| one wins | 2 | 33.3% [9.7%, 70.0%] |" in comparison.markdown()


def test_swapping_the_files_mirrors_the_comparison(files: tuple[Path, Path]) -> None:
    there, back = compare_pairwise(*files), compare_pairwise(*files[::-1])
    assert list(back.counts.values()) == [there.counts[name] for name in ("win of the second", "win of the first", "both good", "both bad")]  # fmt: skip
    assert back.difference.mean == pytest.approx(-there.difference.mean)


@pytest.mark.parametrize(
    ("first", "second", "good", "expected"),
    [
        (4.0, 4.0, 4.0, "both good"),
        (3.9, 3.9, 4.0, "both bad"),
        (3.0, 3.0, 3.0, "both good"),
        (1.1 + 2.2, 3.3, 3.3, "both good"),  # the same number, up to rounding
        (4.25, 4.0, 4.0, "win of the first"),
        (1.0, 1.25, 4.0, "win of the second"),
    ],
)
def test_the_outcome_of_one_row(first: float, second: float, good: float, expected: str) -> None:
    assert pairwise_outcome(first, second, good) == expected


def test_the_threshold_affects_only_ties(files: tuple[Path, Path]) -> None:
    comparison = compare_pairwise(*files, good=2.5)
    assert (comparison.counts["both good"], comparison.counts["both bad"]) == (2, 0)
    assert "both good (a tie at 2.5 or more)" in comparison.markdown()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"judge": "other"}, "Scores of two judges"),
        ({"prompt": "another"}, "these are two data sets"),
        ({"system": "another"}, "another system message .*: these are two data sets"),
        ({"rubrics": [{"criteria": "another", "score": 1.0}]}, "other rubrics .*: these are two data sets"),
        ({"score": None}, "no row has a score in both"),
        ({"score": "4"}, "no line of bench_rows.jsonl"),
    ],
)
def test_other_data_or_judges_cannot_be_compared(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    first = write_lines(tmp_path / "first.jsonl", [result("a", 1.0)])
    second = write_lines(tmp_path / "second.jsonl", [result("a", 1.0) | change])
    with pytest.raises(UserError, match=error):
        compare_pairwise(first, second)


SETTINGS = settings_of(Protocol(JudgeSettings("j"), 3, "first run"), PROMPT_VERSION, PAPERS_RESPONSES)


def sections(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings in the form of bench.json, which omits fields that are not sent to the judge."""
    judge = {name.removeprefix("judge "): value for name, value in settings.items() if name.startswith("judge ")}
    judge |= judge.pop("extra")
    return {
        "judge": {name: value for name, value in judge.items() if value is not None},
        "best_of": {"answers": settings["best of"], "picked_by": settings["picked by"]},
        "decoding": settings["decoding"],
    }


@pytest.mark.parametrize(
    ("setting", "value", "option"),
    [
        ("judge sees_the_system_message", True, "--show-system"),
        ("judge prompt_version", PROMPT_VERSION + 1, ""),
        ("judge runs", 5, "--runs"),
        ("judge retries", 0, "--retries"),
        ("judge max_tokens", 64, "--judge-max-tokens"),
        ("judge temperature", 0.0, "--judge-temperature"),
        ("judge temperature", None, "--judge-temperature"),
        ("judge top_p", 1.0, "--judge-top-p"),
        ("judge extra", {"top_k": 20}, "--judge-extra"),
        ("best of", 4, "--best-of"),
        ("picked by", "all runs", "--pick-by"),
        ("decoding", {**SETTINGS["decoding"], "temperature": 0.0}, "--temperature"),
    ],
)
@pytest.mark.parametrize("kept_in", ["rows", "bench.json"])
def test_scores_with_other_settings_are_not_compared(
    tmp_path: Path, setting: str, value: Any, option: str, kept_in: str
) -> None:
    paths = []
    for name, protocol in (("a", SETTINGS), ("b", SETTINGS | {setting: value})):
        (tmp_path / name).mkdir()
        row = result("r", 3.0) | ({"protocol": protocol} if kept_in == "rows" else {})
        paths.append(write_lines(tmp_path / name / "bench_rows.jsonl", [row]))
        if kept_in == "bench.json":
            (tmp_path / name / "bench.json").write_text(json.dumps(sections(protocol)), encoding="utf-8")
    with pytest.raises(UserError, match=f"as the settings differ: {setting}:? (.+ )?is .+ and .+{option}") as refusal:
        compare_pairwise(*paths)
    assert str(refusal.value).count(" is ") == 1
    assert compare_pairwise(paths[0], paths[0]).notes == []


def test_a_file_without_a_prompt_version_counts_as_version_1(tmp_path: Path) -> None:
    new = write_lines(tmp_path / "new.jsonl", [result("r", 3.0, protocol=SETTINGS)])
    old = write_lines(tmp_path / "old.jsonl", [result("r", 4.0)])
    with pytest.raises(UserError, match="judge prompt_version is 2 and 1") as refusal:
        compare_pairwise(new, old)
    assert str(refusal.value).endswith(
        f"Run bench again for the model of {old} (version 1 of the judge's prompt has been replaced); unchanged answers "
        "are taken from the journal."
    )
    with pytest.raises(UserError, match=f"Run bench again for the model of {old}"):
        compare_pairwise(old, new)


def test_two_differences_are_both_named(tmp_path: Path) -> None:
    other = SETTINGS | {"judge runs": 1, "judge top_p": 0.5}
    for name, protocol in (("a", SETTINGS), ("b", other)):
        write_lines(tmp_path / f"{name}.jsonl", [result("r", 3.0, protocol=protocol)])
    with pytest.raises(UserError, match=r"judge runs is 3 and 1; judge top_p is 0.9 and 0.5\..*--runs, --judge-top-p"):
        compare_pairwise(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    limit = write_lines(tmp_path / "c.jsonl", [result("r", 3.0, protocol=SETTINGS | {"judge max_tokens": 9})])
    with pytest.raises(UserError, match=r"for one of the two with the same --judge-max-tokens \(or max_completion_tok"):
        compare_pairwise(tmp_path / "a.jsonl", limit)


def test_settings_that_an_older_file_lacks_are_named(tmp_path: Path) -> None:
    new = write_lines(tmp_path / "new.jsonl", [result("r", 3.0, protocol=SETTINGS | {"judge prompt_version": 1})])
    old = write_lines(tmp_path / "old.jsonl", [result("r", 4.0)])
    (note,) = compare_pairwise(new, old, names=("Ann", "Bob")).notes
    assert note.startswith("not recorded for Bob, so it may differ: judge sees_the_system_message, judge runs,")
    assert f"Note: {note}." in compare_pairwise(new, old, names=("Ann", "Bob")).markdown()
    # Its bench.json, as it was before `protocol`, holds most of them.
    judge = {
        "model": "j",
        "sees_the_system_message": False,
        "runs": 3,
        "retries": 3,
        "max_tokens": 1024,
    }
    record = {
        "judge": {**judge, "temperature": 1.0, "top_p": 0.9},
        "best_of": {"answers": 3, "picked_by": "first run"},
        "decoding": None,
    }
    (tmp_path / "bench.json").write_text(json.dumps(record), encoding="utf-8")
    comparison = compare_pairwise(new, old, names=("Ann", "Bob"))
    assert comparison.notes == ["not recorded for Bob, so it may differ: decoding"]
    assert comparison.record()["notes"] == comparison.notes
    record["judge"]["min_p"] = 0.1
    (tmp_path / "bench.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=r"judge extra: min_p is null and 0\.1"):
        compare_pairwise(new, old)
    del record["judge"]["min_p"]
    (tmp_path / "bench.json").write_text(json.dumps(record), encoding="utf-8")
    newer = write_lines(tmp_path / "newer.jsonl", [result("r", 3.0, protocol=SETTINGS)])
    with pytest.raises(UserError, match="judge prompt_version is 2 and 1"):
        compare_pairwise(newer, old)


def test_null_and_missing_parameters_are_the_same(tmp_path: Path) -> None:
    decoding = {name: value for name, value in SETTINGS["decoding"].items() if name != "repetition_penalty"}
    paths = [
        write_lines(tmp_path / f"{place}.jsonl", [result("r", 3.0, protocol=SETTINGS | {"decoding": settings})])
        for place, settings in enumerate((decoding, decoding | {"repetition_penalty": None}))
    ]
    assert compare_pairwise(*paths).notes == []


def test_settings_of_the_models_may_differ_and_are_noted(tmp_path: Path) -> None:
    paths = [
        write_lines(tmp_path / f"{place}.jsonl", [result("r", 3.0, protocol=SETTINGS | asked)])
        for place, asked in enumerate(
            ({"system_message_given": True}, {"system_message_given": False, "dtype": "float32"})
        )
    ]
    assert compare_pairwise(*paths).notes == [
        f"system_message_given is true and false ({paths[0]} and {paths[1]})",
        f'dtype is "unknown" and "float32" ({paths[0]} and {paths[1]})',
    ]


def test_another_protocol_is_an_error_before_the_first_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(0)])
    with served(judging(lambda row, rubric, time: "[RESULT] 3")) as server:
        asking = [
            "--data",
            data,
            "--server",
            server.url,
            "--judge",
            "judge",
            "--judge-server",
            server.url,
            "--runs",
            "1",
        ]
        assert command("--model", "m", *asking, "--output-dir", tmp_path / "m") == 0
        asked = len(server.asked)
        asking += ["--against", tmp_path / "m" / "bench_rows.jsonl", "--output-dir", tmp_path / "n", "--model", "n"]
        assert command(*asking, "--judge-temperature", "0", "--best-of", "2", "--pick-by", "all-runs") == 2
        assert len(server.asked) == asked
        refusal = capsys.readouterr().err
        for difference in (
            "judge temperature is 0.0 and 1.0",
            "best of is 2 and 1",
            'picked by is "all runs" and null',
        ):
            assert difference in refusal
        assert command(*asking) == 0
    for name in ("m", "n"):  # the rows are written with the settings that bench.json has in its sections
        (row,) = lines(tmp_path / name / "bench_rows.jsonl")
        written = protocol_of(row)
        assert written == protocol_of(json.loads((tmp_path / name / "bench.json").read_text("utf-8")))
        assert written["judge temperature"] == 1.0
        assert (row["protocol"]["system_message_given"], row["protocol"]["system_role"]) == (True, "native")
    assert "Rows with a score in both: 1." in capsys.readouterr().out


def test_the_command_compares_with_another_models_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [bench_row(number) for number in range(4)]
    data = write_lines(tmp_path / "rows.jsonl", rows)

    def grade(row: int, rubric: int, time: int) -> str:
        return f"[RESULT] {row + 1}"

    def better(row: int, rubric: int, time: int) -> str:
        return f"[RESULT] {max(row + 1, 2)}"

    for name, say in (("m", grade), ("n", better)):
        with served(judging(say), models=["judge"]) as server:
            servers = ["--server", server.url, "--judge", "judge", "--judge-server", server.url]
            against = ["--against", tmp_path / "m" / "bench_rows.jsonl"] if name == "n" else []
            assert command("--model", name, "--data", data, "--output-dir", tmp_path / name, *servers, *against) == 0
    comparison = json.loads((tmp_path / "n" / "bench.json").read_text())["against"]
    assert {name: outcome["rows"] for name, outcome in comparison["outcomes"].items()} == {
        "win of the first": 1,
        "win of the second": 0,
        "both good": 1,
        "both bad": 2,
    }
    assert comparison["difference"]["mean"] == pytest.approx(1 / 4)
    assert "| n wins | 1 | 25.0%" in (tmp_path / "n" / "report.md").read_text()
    shown = capsys.readouterr().out
    assert "| n wins | 1 | 25.0%" in shown
    assert "Rows with a score in both: 4. n minus m: +0.25 (n = 4), p = " in shown
    assert "| n wins | 1 | 25.0% (n = 4) |" in shown
    assert "(n = ...): too few rows for an interval, which needs at least 6." in shown


def test_a_failed_comparison_does_not_affect_the_runs_own_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(3)])
    protocol = {"judge prompt_version": PROMPT_VERSION}
    stranger = write_lines(tmp_path / "bench_rows.jsonl", [result("a", 1.0, protocol=protocol)])
    with served(judging(lambda row, rubric, time: "[RESULT] 3"), models=["judge"]) as server:
        asking = ["--model", "m", "--data", data, "--output-dir", tmp_path / "out", "--server", server.url]
        asking += ["--judge", "judge", "--judge-server", server.url]
        assert command(*asking) == 0
        assert command(*asking, "--limit", "2", "--against", stranger) == 2
    assert "no row has a score in both" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == 2
    assert "(the first 2 of 3: not the complete bench)" in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert len((tmp_path / "out" / "bench_rows.jsonl").read_text("utf-8").splitlines()) == 2
