"""CSR, ISR and SSR: by hand, by a plain loop, and with missing turns."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from sysbench_data import conversation, write_file

from train.evaluation.turns.sysbench_figures import JudgedConversation, figures
from train.evaluation.turns.sysbench_rows import read_conversations
from train.resampling import estimate_share, wilson_interval

COUNTS = (2, 1, 2, 1, 2)
"""Criteria of each turn; their types alternate, beginning with style."""


@pytest.fixture
def read(tmp_path: Path):
    """Return conversations with these verdicts: for each turn a string such as `+-`, one mark for each criterion."""

    def judged(*marks: Sequence[str | None]) -> list[JudgedConversation]:
        rows = [conversation(number, COUNTS) for number in range(len(marks))]
        conversations = read_conversations(str(write_file(tmp_path / "data.json", rows)))
        return [
            JudgedConversation(each, tuple(of_turn and tuple(mark == "+" for mark in of_turn) for of_turn in of_each))
            for each, of_each in zip(conversations, marks, strict=True)
        ]

    return judged


ALL = ("++", "+", "++", "+", "++")
THIRD = ("++", "+", "+-", "+", "++")
FIRST = ("--", "+", "++", "-", "++")


def means(curve: Sequence[dict[str, Any] | None]) -> list[float | None]:
    return [point and point["mean"] for point in curve]


def test_the_figures_of_three_conversations_by_hand(read: Any) -> None:
    """Runs of 5, 2 and 0 turns; 24 criteria of which 1 + 2 + 1 are not met; 15 turns of which 1 + 2 do not hold."""
    result = figures(read(ALL, THIRD, FIRST))
    assert (result["csr"]["mean"], result["csr"]["of"]) == (pytest.approx(20 / 24), 24)
    assert (result["isr"]["mean"], result["isr"]["of"]) == (pytest.approx(12 / 15), 15)
    assert (result["ssr"]["mean"], result["ssr"]["of"]) == (pytest.approx((5 + 2 + 0) / 5 / 3), 3)
    assert means(result["isr_by_turn"]) == pytest.approx([2 / 3, 1, 2 / 3, 2 / 3, 1])
    assert means(result["holds_through"]) == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3])
    aligned, misaligned = (result["by_alignment"][name]["isr"] for name in ("aligned", "misaligned"))
    assert (aligned["mean"], aligned["of"]) == (pytest.approx(7 / 9), 9)
    assert (misaligned["mean"], misaligned["of"]) == (pytest.approx(5 / 6), 6)
    dependent, parallel = (result["by_rounds"][name] for name in ("dependent", "parallel"))
    assert (dependent["ssr"]["mean"], dependent["isr"]["mean"]) == (pytest.approx(2 / 5), pytest.approx(4 / 5))
    assert (parallel["ssr"]["mean"], parallel["csr"]["mean"]) == (pytest.approx(5 / 10), pytest.approx(13 / 16))
    style, format = (result["by_type"][name]["csr"] for name in ("style", "format"))
    assert (style["mean"], style["of"]) == (pytest.approx(13 / 15), 15)
    assert (format["mean"], format["of"]) == (pytest.approx(7 / 9), 9)


def test_a_missing_turn_is_in_no_mean_and_its_conversation_in_no_run(read: Any) -> None:
    """The second conversation breaks before its missing turn; it still has no run, or long runs would be left out."""
    missing_last, missing_after_break = ("++", "+", "++", "+", None), ("--", "+", None, "+", "++")
    result = figures(read(ALL, missing_last, missing_after_break, FIRST))
    assert (result["csr"]["mean"], result["csr"]["of"]) == (pytest.approx((8 + 6 + 4 + 5) / 28), 8 + 6 + 6 + 8)
    assert (result["isr"]["mean"], result["isr"]["of"]) == (pytest.approx((5 + 4 + 3 + 3) / 18), 18)
    assert (result["ssr"]["mean"], result["ssr"]["of"]) == (pytest.approx((5 + 0) / 5 / 2), 2)
    assert [point["of"] for point in result["isr_by_turn"]] == [4, 4, 3, 4, 3]
    assert means(result["isr_by_turn"]) == pytest.approx([2 / 4, 1, 1, 3 / 4, 1])
    assert [point["of"] for point in result["holds_through"]] == [2] * 5
    assert means(result["holds_through"]) == pytest.approx([1 / 2] * 5)
    assert result["by_alignment"]["misaligned"]["isr"]["of"] == 6


def test_without_any_verdict_a_figure_is_missing_and_not_zero(read: Any) -> None:
    result = figures(read([None] * 5, [None] * 5))
    assert [result[name] for name in ("csr", "isr", "ssr")] == [None] * 3
    assert result["isr_by_turn"] == result["holds_through"] == [None] * 5
    assert result["by_type"] == {}
    only_parallel = figures(read(ALL))["by_rounds"]
    assert only_parallel["dependent"]["ssr"] is None
    assert only_parallel["parallel"]["ssr"]["mean"] == 1


def test_the_figures_equal_a_plain_loop_over_random_verdicts(read: Any) -> None:
    rng = random.Random(3)

    def mark(count: int) -> str | None:
        return None if rng.random() < 0.02 else "".join(rng.choice("+++++-") for _ in range(count))

    marks = [[mark(count) for count in COUNTS] for _ in range(60)]
    result = figures(read(*marks))
    complete = [of_each for of_each in marks if None not in of_each]
    assert 30 < len(complete) < 60
    runs = []
    for of_each in complete:
        run = 0
        while run < 5 and "-" not in of_each[run]:
            run += 1
        runs.append(run)
    assert result["ssr"]["mean"] == pytest.approx(fmean(runs) / 5)
    assert result["ssr"]["mean"] == pytest.approx(fmean(point["mean"] for point in result["holds_through"]))
    turns = [of_turn for of_each in marks for of_turn in of_each if of_turn]
    assert result["isr"]["mean"] == pytest.approx(sum("-" not in of_turn for of_turn in turns) / len(turns))
    assert result["csr"]["mean"] == pytest.approx("".join(turns).count("+") / len("".join(turns)))
    for turn in range(5):
        verdicts = [of_each[turn] for of_each in marks if of_each[turn]]
        assert result["isr_by_turn"][turn]["mean"] == pytest.approx(fmean("-" not in each for each in verdicts))


def test_intervals_are_over_conversations(read: Any) -> None:
    marks = [ALL if number % 3 else ("-+", "-", "+-", "-", "--") for number in range(30)]
    result = figures(read(*marks))
    assert result["isr"]["mean"] == pytest.approx(20 / 30)
    turns = [float(bool(number % 3)) for number in range(30) for _ in range(5)]
    grouped = estimate_share(turns, [f"{number // 5:02d}" for number in range(150)])
    assert (result["isr"]["low"], result["isr"]["high"]) == (grouped.low, grouped.high)
    assert result["isr"]["groups"] == 30
    low, high = wilson_interval(20 / 30, 30)
    assert (result["holds_through"][0]["low"], result["holds_through"][0]["high"]) == (low, high)
