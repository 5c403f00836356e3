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
def test_a_score_in_the_last_words_is_read(last_words: str) -> None:
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
def test_texts_without_a_clear_score_are_not_read(text: str) -> None:
    assert parse_score(text) is None


def test_the_last_tag_decides_in_any_brackets() -> None:
    tags = ("[RESULT]", "【RESULT】", "\\[RESULT\\]")
    for (first, number), (second, other) in itertools.permutations(zip(tags, "123", strict=True), 2):
        assert parse_score(f'It quotes "{first} {number}". {second} {other}') == int(other)


@given(
    st.sampled_from(["\\[RESULT\\] {}", "【RESULT】 {}", "**Result: {}**", "\\boxed{{{}}}", "[RESULT: {}]"]),
    st.integers(),
)
def test_only_one_to_five_are_scores(form: str, number: int) -> None:
    assert parse_score(f"So.\n{form.format(number)}") == (number if 1 <= number <= 5 else None)


def test_long_texts_take_no_time() -> None:
    for piece in ("\\boxed{", "result ", "【RESULT】", "\\[RESULT", "result: 4 ", "\n*"):
        parse_score(piece * 20_000)


@pytest.mark.parametrize(
    "text",
    [
        "[RESULT] n = 4",
        "[RESULT] n: 4",
        "[RESULT] (n = 4)",
        "[RESULT] 4.0",
        "[RESULT] 4.0/5",
        "[RESULT] 4.0 / 5.0",
        "[RESULT] 4 (out of 5)",
        "[RESULT] 4 on a scale of 1 to 5",
        "[RESULT] 4 of 5",
        "[RESULT] 4 (Good)",
        "[RESULT] 4 as two of ten facts are missing",
        "[RESULT] 4 because 3 of 10 facts are missing",
        "[RESULT] 4 [RESULT]",
        "**[RESULT] 4 [RESULT]**",
        "It is good.\n### Result\n4",
        "It is good.\n**Result**\n\n4",
        "It is good.\n## Final score:\n\n**4/5**",
        "**Rating:**\n4",
        "Rating: [[4]]",
        "My verdict is [[4]]",
        "<score>4</score>",
        "It is good.\n<rating>4</rating>",
        '{"score": 4, "reason": "x"}',
        '{"reason": "A 5 needs more.", "score": 4}',
        'Here it is:\n```json\n{"Score": "4/5",\n "feedback": "as {x}"}\n```',
        '{"final_score": 4.0, "max_score": 5}',
        "I would give it a score of 4.",
        "Overall, I'd give this answer a score of 4.",
        "Therefore, I would thus assign a score of 4.",
        "Score: 4 (Good)",
        "Rating: 4 (very good, with a small flaw)",
        "**Score:** 4 (good)",
    ],
)
def test_a_clear_score_is_read(text: str) -> None:
    assert parse_score(text) == 4


@pytest.mark.parametrize(
    "text",
    [
        "The reference has a score of 5",
        "The reference answer earns a score of 5.",
        "### Reference answer (score 5)",
        "### Reference answer\nScore: 5",
        "Weaker than the reference [5]",
        "Maximum score: 5",
        "The highest possible score is 5",
        "It needs an example to earn a score of 5.",
        "It fails to earn a score of 4.",
        "It earns almost a score of 4.",
        "If it had an example I would give it a score of 5.",
        "With an example, I would give it a score of 5.",
        "Had it been shorter, I'd give it a score of 5.",
        "[RESULT] 5 on a scale of 1 to 10",
        "[RESULT] 5 (on a 10-point scale)",
        "[RESULT] 4 on a ten-point scale",
        "[RESULT] 5 (out of 10)",
        "[RESULT] 5 (out of a possible 10)",
        "[RESULT] 4 of 10",
        "[RESULT] 4 stars out of ten",
        "[RESULT] 4 and a half",
        "[RESULT] 4 plus",
        "[RESULT] 4 percent",
        "[RESULT] 4 point 5",
        "[RESULT] 4 (maybe 5)",
        "[RESULT] 4, or perhaps 5",
        "[RESULT] 4 or maybe a five",
        'It says "[RESULT] 5" [RESULT]',
        "[RESULT] 4.05",
        "[RESULT] 4,000",
        "Score: 4 (out of ten)",
        "Score: 4 (half a point less than before)",
        "Rating: 4 (of ten)",
        "Rating: [[6]]",
        "<score>40</score>",
        "the page <score>4</score>",
        '{"score": 4, "max_score": 10}',
        '{"score": 4, "scale": "1-10"}',
        '{"score": 4, "rating": 3}',
        '{"score": 4.5, "reason": "x"}',
        '{"score": true}',
        '{"score": 7}',
        "### Result\nIt is 4",
        "### Steps\n4",
    ],
)
def test_ambiguous_numbers_are_not_read(text: str) -> None:
    assert parse_score(text) is None


def test_long_texts_of_braces_and_headings_take_no_time() -> None:
    for piece in (
        "{",
        '\n{"a": ',
        "\n### Result\n",
        "[RESULT] 4 of ",
        "score of 4 (a ",
        "\n}",
        "[RESULT] 4 " + "or " * 40,
    ):
        parse_score(piece * 20_000)
        parse_score(piece * 20_000 + "}")
