"""Scores in the forms that judges write instead of `[RESULT] n`."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.multifaceted.judge import parse_score


@pytest.mark.parametrize(
    "last_words",
    [
        # the tag in other brackets
        "\\[RESULT\\] 4",
        "\\[RESULT\\]: 4",
        "【RESULT】 4",
        "【Result】：4",
        "［RESULT］ 4",
        "[[RESULT]] 4",
        "`[RESULT]` 4",
        "[RESULT]: **4**",
        "[RESULT] -> 4",
        "[RESULT] → 4/5",
        "[RESULT] \\boxed{4}",
        "[RESULT] $\\boxed{4}$",
        "\\boxed{[RESULT] 4}",
        "[RESULT] 4 [/RESULT]",
        # the word without its brackets, on a line of its own at the end
        "**Result: 4**",
        "RESULT: 4",
        "Result：4",
        "RESULT 4",
        "[RESULT: 4]",
        "[RESULT=4]",
        "(Result: 4)",
        "### Result: 4/5",
        "**Result:** 4 out of 5.",
        "- Final result: **4**",
        "<result>4</result>",
        "<RESULT> 4",
        '{"result": 4}',
        "Result: \\boxed{4}",
        "Grade: 4",
        "**Rating**: 4/5",
        "Final grade = 4",
        "The final score: 4",
        # a box on a line of its own at the end
        "\\boxed{4}",
        "$\\boxed{4}$",
        "$$\\boxed{4/5}$$",
        "**\\boxed{4}**",
        "\\[\\boxed{4}\\]",
        "\\boxed{\\text{4}}",
    ],
)
def test_read(last_words: str) -> None:
    assert parse_score(f"It is fine.\n{last_words}") == 4
    assert parse_score(f"It is fine.\n\n{last_words}\n") == 4


@pytest.mark.parametrize(
    "text",
    [
        "The answer computes the result: 4",
        "The sum is right, with the result 4",
        "It ends in the wrong result, 4.",
        "It says that x = \\boxed{4}.",
        "The answer ends with \\boxed{4}",
        "Result: 4\nThis is what the answer computes.",
        "\\boxed{4}\nis what it should have been",
        "Result: 4.5",
        "Result: -4",
        "Result: 40",
        "Result: 0",
        "Result: 4/10",
        "Result: 4 or 5",
        "Result: 4-5",
        "Result: four",
        "Result: n",
        "Result: 4 apples",
        "Result:\n4",
        "\\boxed{40}",
        "\\boxed{4.5}",
        "\\boxed{x = 4}",
        "\\boxed{4} or \\boxed{5}",
        "Results: 4",
        "Resulting score",
        "RESULT: ４",
        "【RESULT】 ４",
        "\\[RESULT\\] 10",
        "【RESULT】 4-5",
        "Result: 4\n[RESULT] n",
        "【RESULT】 3\n[RESULT] unsure",
    ],
)
def test_unread(text: str) -> None:
    assert parse_score(text) is None


def test_the_last_tag_decides_in_whatever_brackets() -> None:
    tags = ("[RESULT]", "【RESULT】", "\\[RESULT\\]")
    for (first, one), (second, other) in itertools.permutations(zip(tags, "123", strict=True), 2):
        assert parse_score(f'It quotes "{first} {one}". {second} {other}') == int(other)


@given(
    st.sampled_from(["\\[RESULT\\] {}", "【RESULT】 {}", "**Result: {}**", "\\boxed{{{}}}", "[RESULT: {}]"]),
    st.integers(),
)
def test_only_one_to_five(form: str, number: int) -> None:
    assert parse_score(f"So.\n{form.format(number)}") == (number if 1 <= number <= 5 else None)


def test_long_texts_take_no_time() -> None:
    for piece in ("\\boxed{", "result ", "【RESULT】", "\\[RESULT", "result: 4 ", "\n*"):
        parse_score(piece * 20_000)
