"""Verdicts of replies to yes-or-no questions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.llm.yes_or_no import says_no

YES = [
    "Yes",
    "YES!",
    '"Yes"',
    "**Yes**",
    "1. Yes",
    "yes, it does",
    "Yes it does.",
    "Yes—it does",
    "Yes - it has no emojis",
    "Yes because it is short",
    "Yes, there is no problem.",
    "Verdict: yes",
    "Answer:Yes",
    "Answer = Yes",
    "The answer is yes.",
    "Final answer: **Yes**.",
    "So my answer is yes",
    "I'd say yes, as it is short.",
    "It's a clear yes.",
    "<answer>Yes</answer>",
    "<answer> yes </answer>\n",
    "\\boxed{Yes}",
    "$\\boxed{\\text{Yes}}$",
    '{"verdict": "Yes"}',
    "[Yes]",
    "(yes)",
    "✅ Yes",
    "Yes or No: Yes",
    # `no` belongs to the next word
    "The answer uses no jargon, as the message asks, so yes.",
    "There is no violation. Yes",
    "No issues: yes.",
    "No jargon, no slang. Yes.",
    "No requirement is left out, therefore yes",
    "The answer is no longer than asked. Yes.",
    "No emoji is used; yes.",
    # a mention of the word is no verdict
    'The message says to reply with "no" to rude questions, and it does. Yes.',
    "A no-nonsense tone, as asked: yes",
    "Mostly yes",
    "Yes. No change is needed.",
    "The response is yes",
    "Rule No. 3 is followed as well. Yes.",
]
NO = [
    "No",
    "No.",
    "NO!!",
    "no",
    "**No**",
    "*No.*",
    "'no'",
    "No, it uses jargon.",
    "No - it is too long",
    "No because it is too long",
    "No it does not.",
    "No the answer is rude.",
    "No\n\nThe message asks for three steps.",
    "It is rude, so no.",
    "The answer has no list. No.",
    "Answer: No",
    "Verdict: **No**",
    "The verdict is no.",
    "Yes or no? No.",
    "It says yes to the user although the message forbids it. No.",
    "<answer>No</answer>",
    "\\boxed{no}",
    "```\nNo\n```",
    "- No",
    "The response is No.",
    "The correct answer is No",
    "Therefore the response would be No",
    "No due to tone",
    "No, the answer is long. Yes would need brevity.",
    "The right answer is: no",
    "Largely no.",
]
UNREAD = [
    "",
    "Not quite",
    "Maybe",
    "Ja",
    "yes/no",
    "Yes or No",
    "Yes and no.",
    "Yes, but no.",
    "No. Wait, yes.",
    "Yes. On second thought: no",
    "There is no violation",
    "No violation",
    "No doubt it does",
    "No one could object",
    "The system message says to use no",
    "The answer is no worse than the others",
    'The message says to answer "no".',
    "The assistant should say yes more often",
    "The answer is not yes",
    "Nothing",
    "Yesterday",
    "None",
    "I know",
]


@pytest.mark.parametrize("reply", YES)
def test_yes(reply: str) -> None:
    assert says_no(reply) is False


@pytest.mark.parametrize("reply", NO)
def test_no(reply: str) -> None:
    assert says_no(reply) is True


@pytest.mark.parametrize("reply", UNREAD)
def test_replies_without_a_verdict(reply: str) -> None:
    assert says_no(reply) is None


@given(st.text(max_size=80).filter(lambda text: "yes" not in text.casefold() and "no" not in text.casefold()))
def test_a_reply_without_the_two_words_has_no_verdict(reply: str) -> None:
    assert says_no(reply) is None


@given(st.sampled_from(["Yes", "No", "yes", "NO"]), st.sampled_from(["", ".", "!", ",", "**", '"', "\n", " "]))
def test_one_word_in_any_marks_is_a_verdict(word: str, mark: str) -> None:
    assert says_no(f"{mark}{word}{mark}") is (word.casefold() == "no")


def test_a_long_reply_takes_no_time() -> None:
    for piece in ("no ", "yes no ", "no.", "so ", "the answer is ", "((((", "yes/"):
        says_no(piece * 20_000)
