"""Reasoning that a model writes before what it says is told from it, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.llm.reasoning import without_reasoning


@pytest.mark.parametrize(
    ("text", "said", "reasoning"),
    [
        ("<think>\nHm, Bern.\n</think>\n\nBern.", "Bern.", "Hm, Bern."),
        ("\n<think></think>\n\nBern.", "Bern.", ""),
        ("Hm, Bern.\n</think>\n\nBern.", "Bern.", "Hm, Bern."),  # the template has opened it
        ("Hm, Bern.</think>\nBern.", "Bern.", "Hm, Bern."),
        ("`zip`? Like\n```\nzip(a)\n```\n</think>\n\nBern.", "Bern.", "`zip`? Like\n```\nzip(a)\n```"),
        ("```\nhm\n</think>\n```", "```\nhm\n</think>\n```", None),
        ("[THINK]Hm.[/THINK]Bern.", "Bern.", "Hm."),
        ("<seed:think>Hm.</seed:think>Bern.", "Bern.", "Hm."),
        ("<think>a <think>b</think> c", "c", "a <think>b"),
        ("Bern.", "Bern.", None),
        ("", "", None),
        ("  Bern. \n", "  Bern. \n", None),
        ("Models write <think>\nhm\n</think>\nbefore it.", "Models write <think>\nhm\n</think>\nbefore it.", None),
        ("It ends with `</think>`\nand then", "It ends with `</think>`\nand then", None),
        ("It ends with </think> and then", "It ends with </think> and then", None),
    ],
)
def test_what_was_said_and_what_was_thought(text: str, said: str, reasoning: str | None) -> None:
    found = without_reasoning(text)
    assert (found.text, found.reasoning, found.unfinished) == (said, reasoning, False)


def test_reasoning_without_an_end_says_nothing() -> None:
    found = without_reasoning("<think>Hm, Bern or Geneva, or")
    assert (found.text, found.reasoning, found.unfinished) == ("", "Hm, Bern or Geneva, or", True)


def test_tags_that_are_left_are_seen() -> None:
    assert without_reasoning("It is <think>hm</think> Bern.").holds_reasoning
    assert not without_reasoning("<think>hm</think>Bern, I think.").holds_reasoning


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "`", "\n", " ", "a"])).map("".join))
def test_what_is_said_is_an_end_of_what_was_written(text: str) -> None:
    found = without_reasoning(text)
    assert text.endswith(found.text)
    if not found.unfinished:
        assert (found.reasoning is None) == (found.text == text)
