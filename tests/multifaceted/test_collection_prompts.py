"""How the replies of models are read, and what a message tells of its instruction."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_author import FOUR

from train.multifaceted import collection_prompts as prompts
from train.multifaceted.leaked_words import told_share
from train.multifaceted.message_examples import EXAMPLES
from train.multifaceted.preferences import Preference, load_hierarchy

ASKED = [Preference(name, sub, "p") for name, sub in zip(FOUR, ("tone", "novice", "depth", "safety"), strict=True)]


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("style: Dry wit\nharmlessness: Careful", {"style": "Dry wit", "harmlessness": "Careful"}),
        ("- **Style**: Dry wit", {"style": "Dry wit"}),
        ("**Style:** Dry wit", {"style": "Dry wit"}),
        ("1. Background knowledge: Knows none of it", {"background_knowledge": "Knows none of it"}),
        ("- style, tone: Dry wit", {"style": "Dry wit"}),
        ("style / tone: Dry wit", {"style": "Dry wit"}),
        ("Style (tone): Dry wit", {"style": "Dry wit"}),
        ("style: tone: Dry wit", {"style": "Dry wit"}),
        ('style: "Dry wit"', {"style": "Dry wit"}),
        ("style: Wit: the dry kind", {"style": "Wit: the dry kind"}),
        ("style: Dry wit\nstyle: Solemn", {"style": "Dry wit"}),
        ("style:\nstyle: Solemn", {"style": "Solemn"}),
        ("style: tone\nharmlessness: <preference>\ninformativeness: ...", {}),
        ("Sure! Here it is:\n\nstyle: Dry wit", {"style": "Dry wit"}),
        ("In style: it depends", {}),
        ("tone: Dry wit", {}),
        ("", {}),
    ],
)
def test_lines_are_read_in_the_forms_that_models_write(reply: str, found: dict[str, str]) -> None:
    assert prompts.read_lines(reply, ASKED) == found


def test_the_last_line_of_a_cut_reply_is_not_read() -> None:
    reply = "style: Dry wit\nharmlessness: Care"
    assert prompts.read_lines(reply, ASKED, cut=True) == {"style": "Dry wit"}
    assert prompts.read_lines("style: Dry", ASKED, cut=True) == {}


def test_only_what_is_asked_for_is_read() -> None:
    assert prompts.read_lines("style: Dry wit\nharmlessness: Care", ASKED[3:]) == {"harmlessness": "Care"}


@given(st.dictionaries(st.sampled_from(FOUR), st.from_regex(r"[A-Za-z][A-Za-z ,;.]{0,60}[a-z]", fullmatch=True)))
def test_what_is_written_as_asked_is_read_as_it_is(texts: dict[str, str]) -> None:
    names = {"tone", "novice", "depth", "safety", "preference", "description", "none"}
    texts = {name: " ".join(text.split()) for name, text in texts.items() if text.strip(" .,;").casefold() not in names}
    assert prompts.read_lines("\n".join(f"{name}: {text}" for name, text in texts.items()), ASKED) == texts


@given(st.text())
def test_nothing_that_a_model_writes_raises(reply: str) -> None:
    assert set(prompts.read_lines(reply, ASKED)) <= set(FOUR)
    assert prompts.read_message(reply) in reply
    assert isinstance(prompts.is_refusal(reply), bool)


@pytest.mark.parametrize(
    "reply",
    [
        "You are one.",
        "  You are one.\n",
        '"You are one."',
        "“You are one.”",
        "System message: You are one.",
        "**System message:**\n\nYou are one.",
        "# System Prompt\n\nYou are one.",
        "Here is the system message:\n\nYou are one.",
        "```text\nYou are one.\n```",
        '```\n"You are one."\n```',
    ],
)
def test_a_message_is_taken_out_of_what_stands_around_it(reply: str) -> None:
    assert prompts.read_message(reply) == "You are one."


@pytest.mark.parametrize(
    "reply", ['"Ahoy" is how you begin, and you end with "Bye".', '"Yes" or "no" is all you say, my "friend"']
)
def test_quotation_marks_that_belong_to_a_message_stay(reply: str) -> None:
    assert prompts.read_message(reply) == reply


def test_refusals_are_told_from_messages() -> None:
    for text in (
        "I'm sorry, but I can't do that.",
        "Sorry, I won’t.",
        "As an AI, I must not.",
        "I cannot assist with it.",
    ):
        assert prompts.is_refusal(text)
    for example in EXAMPLES:
        assert not prompts.is_refusal(example.message)
    assert not prompts.is_refusal("Say that you are sorry whenever you can't help.")


def test_our_examples_keep_the_rules_that_the_prompt_states() -> None:
    for example in EXAMPLES:
        assert 80 <= len(example.message.split()) <= 180
        assert example.message.startswith("You ")
        assert "\n" not in example.message
    texts = [example.message for example in EXAMPLES]
    assert len({text.split(".")[0] for text in texts}) == len(texts)


def test_the_examples_of_a_prompt_follow_from_the_seed() -> None:
    descriptions = [f"The answer is {name}." for name in FOUR]
    one, same, other = (prompts.message(descriptions, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert [turn["role"] for turn in one] == ["user", "assistant"] * 3 + ["user"]
    assert sorted(one[-1]["content"].splitlines()[1:]) == sorted(f"- {text}" for text in descriptions)
    described = prompts.describe(ASKED, load_hierarchy(), random.Random(1))
    lines = described[1]["content"].splitlines()
    assert [line.partition(":")[0] for line in lines] == list(FOUR)
    # The example's reply is read by the same rules.
    assert len(prompts.read_lines(described[1]["content"], ASKED)) == 4


@pytest.mark.parametrize(
    ("message", "instruction", "share"),
    [
        ("You mend bicycles. A rusty chain is no matter.", "What is the matter with the rusty bicycle chain?", 3 / 4),
        ("You are brief.", "What is the matter with the rusty bicycle chain?", 0.0),
        ("A rusty chain.", "What is the matter with the rusty bicycle chain?", 0.0),  # two words are no sign
        ("You write about love.", "What is love?", 0.0),
        ("Explain what people would like about these things.", "Explain what people would like about these things.", 0.0),
        ("Über Fahrräder und rostige Ketten", "Was tun gegen rostige Ketten an Fahrräder?", 3 / 4),
    ],
)  # fmt: skip
def test_the_share_of_an_instruction_that_a_message_tells(message: str, instruction: str, share: float) -> None:
    assert told_share(message, instruction) == pytest.approx(share)
