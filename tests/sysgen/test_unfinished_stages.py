"""Unfinished answers in each stage of SYSGEN: their reasons, and that none is written."""

from pathlib import Path
from typing import Any

import pytest
from scripted_model import number_in
from scripted_server import Asked, Reply, said
from sysgen_runs import good_everything, lines, only_reason, only_row, question, run_with, saying

HALF = "Water boils because its"

ANSWERS: list[tuple[Reply, str, str]] = [
    (said(HALF, "MAX_TOKENS"), "new answer cut at the token limit", HALF),
    (said(HALF, "model_length"), "new answer cut at the token limit", HALF),
    (said(None, "content_filter: PROHIBITED_CONTENT"), "new answer refused", "content_filter: PROHIBITED_CONTENT"),
    (said(HALF, "guardrail_intervened"), "new answer refused", HALF),
    (said("", content=[{"type": "refusal", "refusal": "I can't."}]), "new answer refused", "I can't."),
    (said(None, tool_calls=[{"id": "1"}]), "new answer calls a tool", "finish_reason tool_calls"),
    (said(HALF, "foo"), "new answer ended for an unknown reason (foo)", HALF),
    (said(HALF, "OTHER"), "new answer ended for an unknown reason (OTHER)", HALF),
]
"""The reply to question [n], the reason of its row, and what stands in the detail."""


async def unfinished(asked: Asked) -> Reply:
    text = good_everything(asked)
    return ANSWERS[number_in(asked.prompt)][0] if text == "a fine new answer" else said(text)


QUESTIONS = [question(f"question [{number}] of the same kind?") for number in range(len(ANSWERS))]


def test_a_row_with_an_unfinished_answer_is_dropped_with_its_reason(tmp_path: Path) -> None:
    done, _ = run_with(unfinished, tmp_path, QUESTIONS)
    left_out = lines(tmp_path / "out" / "left_out.jsonl")
    assert [row["reason"] for row in left_out] == [reason for _, reason, _ in ANSWERS]
    assert all(detail in row["detail"] for row, (_, _, detail) in zip(left_out, ANSWERS, strict=True))
    report = done.report.read_text("utf-8")
    for name in ("foo", "OTHER"):
        assert f"answer: answer ended for an unknown reason ({name})" in report


@pytest.mark.parametrize("choice", ["keep", "original"])
def test_an_unfinished_answer_is_written_if_the_configuration_keeps_it(tmp_path: Path, choice: str) -> None:
    run_with(unfinished, tmp_path, QUESTIONS, on_unfinished_answer=choice)
    answers = [row["messages"][2]["content"] for row in lines(tmp_path / "out" / "data" / "rows.jsonl")]
    halves = [HALF for reply, _, detail in ANSWERS if detail == HALF]
    assert answers == (halves if choice == "keep" else ["old answer"] * len(ANSWERS))


@pytest.mark.parametrize("reply", [said(HALF, "abort"), said("")])
def test_aborted_and_empty_answers_are_requested_again_in_each_stage(tmp_path: Path, reply: Reply) -> None:
    async def script(asked: Asked) -> Reply:
        return reply if asked.times == 0 else said(good_everything(asked))

    _, asked = run_with(script, tmp_path, [question()], gates={"judge": True})
    assert only_row(tmp_path)["messages"][2]["content"] == "a fine new answer"
    assert [request.times for request in asked] == [0, 1] * 4


def verification(reply: Reply) -> Any:
    async def script(asked: Asked) -> Reply:
        return reply if "Judge for each of the eight" in asked.prompt else said(good_everything(asked))

    return script


VERIFICATIONS = {
    "verification refused": said(None, "content_filter"),
    "verification cut at the token limit": said("<<Task>>: Good\n<<Ro", "length"),
    "verification ended for an unknown reason (foo)": said("<<Task>>: Good", "foo"),
}


@pytest.mark.parametrize(("reason", "reply"), VERIFICATIONS.items(), ids=VERIFICATIONS)
def test_an_unfinished_verification_is_no_missing_verdict(tmp_path: Path, reason: str, reply: Reply) -> None:
    done, asked = run_with(verification(reply), tmp_path, [question()])
    assert only_reason(tmp_path) == reason
    assert sum("Judge for each of the eight" in request.prompt for request in asked) == 3  # with two more tries
    assert done.stats.events[reason] == 3
    assert f"| {reason} | 3 |" in done.report.read_text("utf-8")
    assert "verdict that can't be read" not in done.stats.events + done.stats.drop_counts

    (tmp_path / "kept").mkdir()
    done, asked = run_with(verification(reply), tmp_path / "kept", [question()], on_unfinished_verification="keep")
    assert only_row(tmp_path / "kept")["messages"][0]["content"] == "You are a tester."
    assert done.stats.events[f"{reason}, and its phrases kept"] == 1


def test_a_cut_verification_with_all_verdicts_counts(tmp_path: Path) -> None:
    run_with(verification(said("<<Role>>: Bad\n<<Tas", "length")), tmp_path, [question()], on_empty="drop")
    assert only_reason(tmp_path) == "no phrase was verified"


def test_a_refused_judgement_is_no_verdict(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        return said("No.", "content_filter") if text == "Yes" else said(text)

    done, _ = run_with(script, tmp_path, [question()], gates={"judge": True})
    assert only_row(tmp_path)["messages"][2]["content"] == "a fine new answer"
    assert done.stats.events["judgement refused"] == 1


def test_a_server_without_finish_reasons_is_usable(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        reply = await saying()(asked)
        del reply.body["choices"][0]["finish_reason"]
        return reply

    done, _ = run_with(script, tmp_path, [question()])
    assert only_row(tmp_path)["messages"][2]["content"] == "a fine new answer"
    for stage in ("generate", "verify", "answer"):
        assert done.stats.events[f"{stage}: answer without a finish_reason, below the token limit"] == 1
