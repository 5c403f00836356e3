"""Sentences on missing answers, in singular and plural."""

import pytest

from train.evaluation.answer_endings import summarize_unanswered


@pytest.mark.parametrize(
    ("verb", "failures", "not_asked", "text"),
    [
        ("fail", [], 0, ""),
        ("fail", [("", "too\nlong")], 0, "1 prompt got no answer and fails; the first: too long"),
        ("fail", [("a", "x"), ("b", "y")], 0, "2 prompts got no answer and fail; the first (a): x"),
        ("count as not held", [("a", "x")], 0, "1 prompt got no answer and counts as not held; the first (a): x"),
        (
            "count as not held",
            [("a", "x"), ("b", "y")],
            3,
            "5 prompts got no answer and count as not held (3 of them come after such a prompt); the first (a): x",
        ),
    ],
)
def test_missing_answers_are_counted_with_the_first_reason(
    verb: str, failures: list[tuple[str, str]], not_asked: int, text: str
) -> None:
    assert summarize_unanswered("prompt", verb, failures, not_asked) == text
