"""Prompts of the collection, parsing of replies, and the share of an instruction that a message leaks."""

import hashlib
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_author import FOUR

from train.datagen.stop_patterns import cut_at_stop_pattern
from train.multifaceted.collection import prompts
from train.multifaceted.collection.few_shot_messages import EXAMPLES
from train.multifaceted.collection.hierarchy import OURS, PlannedPreference, Preference, load_hierarchy
from train.multifaceted.collection.leakage import measure_instruction_leak

HIERARCHY = load_hierarchy()
ASKED = [Preference(name, sub, "p") for name, sub in zip(FOUR, ("tone", "novice", "depth", "safety"), strict=True)]


@pytest.mark.parametrize(
    ("reply", "lines"),
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
def test_lines_are_parsed_in_the_forms_that_models_write(reply: str, lines: dict[str, str]) -> None:
    assert prompts.parse_dimension_lines(reply, ASKED) == lines


def test_the_last_line_of_a_cut_reply_is_ignored() -> None:
    reply = "style: Dry wit\nharmlessness: Care"
    assert prompts.parse_dimension_lines(reply, ASKED, cut=True) == {"style": "Dry wit"}
    assert prompts.parse_dimension_lines("style: Dry", ASKED, cut=True) == {}


def test_only_requested_dimensions_are_parsed() -> None:
    assert prompts.parse_dimension_lines("style: Dry wit\nharmlessness: Care", ASKED[3:]) == {"harmlessness": "Care"}


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FOUR), st.from_regex(r"[A-Za-z][A-Za-z ,;.]{0,60}[a-z]", fullmatch=True)))
def test_a_reply_in_the_prompts_form_is_parsed_unchanged(texts: dict[str, str]) -> None:
    names = {"tone", "novice", "depth", "safety", "preference", "description", "none"}
    texts = {name: " ".join(text.split()) for name, text in texts.items() if text.strip(" .,;").casefold() not in names}
    assert prompts.parse_dimension_lines("\n".join(f"{name}: {text}" for name, text in texts.items()), ASKED) == texts


@settings(deadline=None)
@given(st.text())
def test_no_reply_makes_the_parser_raise(reply: str) -> None:
    assert set(prompts.parse_dimension_lines(reply, ASKED)) <= set(FOUR)
    assert prompts.parse_message(reply) in reply
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
def test_a_message_is_extracted_from_the_text_around_it(reply: str) -> None:
    assert prompts.parse_message(reply) == "You are one."


MESSAGE_TEXT = "You are a patient guide who explains things briefly: first the point, then why it matters."


@pytest.mark.parametrize(
    "around",
    [
        "Sure! Here is a system message that covers everything:\n\n{}",
        "Sure! Here's the system message: {}",
        "Certainly! Below is a system message:\n{}",
        "Of course! Here you go:\n---\n{}",
        "Okay.\n{}",
        "Got it!\n\n**System message:**\n\n{}",
        "Here is your system prompt:\n\n```\n{}\n```\n\nLet me know if you need changes.",
        'Here is a system message:\n\n"{}"\n\n---\n\nExplanation: it is short.',
        "{}\n\n---\n\nThis message covers all four descriptions.",
        "{}\n\nThis system message covers all four.",
        "{}\n***",
        "{}\n\nNote: it is short.",
        "{}\n\n(Word count: 112)",
        "{} (112 words)",
        "<system_message>\n{}\n</system_message>",
        "<system>{}</system>",
        "<prompt>\n{}",
    ],
)
def test_a_lead_in_a_note_and_a_tag_are_removed_from_a_message(around: str) -> None:
    assert prompts.parse_message(around.format(MESSAGE_TEXT)) == MESSAGE_TEXT


@pytest.mark.parametrize(
    "message",
    [
        "You are a guide.\n\nYou use lists.",
        "Act as a tutor. End each answer with a question: can the user say it in other words?",
        "As a tutor, you answer in this order:\nthe point, the reason, an example.",
        "Du bist ein Lehrer. Frage am Ende: Was fehlt noch?",
        "As an AI tutor, you explain each step.",
        "You are a coach. Never say: I cannot help.",
        *(example.message for example in EXAMPLES),
    ],
)
def test_a_plain_message_is_unchanged(message: str) -> None:
    assert prompts.parse_message(message) == message
    assert prompts.is_system_message(message)
    assert not prompts.is_refusal(message)


@pytest.mark.parametrize(
    "reply",
    [
        "Could you please share the four descriptions?",
        "Please provide the four descriptions.",
        "I need more. Could you tell me what you want?",
        "What are the four descriptions?",
        '{"system_message": "You are one."}',
        '[\n  {"role": "system"}\n]',
        "# Role\nYou are one.\n# Style\nBe brief.",
        "You are one.\n\n### Descriptions\n- The answer is short.",
        "<<Role>>You are one.<</Role>>",
    ],
)
def test_a_text_without_a_paragraph_is_no_message(reply: str) -> None:
    assert not prompts.is_system_message(prompts.parse_message(reply))


def test_a_message_ends_where_an_invented_turn_begins() -> None:
    turn = prompts.STOP_PATTERNS["message"]
    for made_up in ("### Descriptions\n- The answer is short.", "### System message\nYou are a pilot.", "## User\nHi"):
        assert cut_at_stop_pattern(f"{MESSAGE_TEXT}\n\n{made_up}", turn) == MESSAGE_TEXT
    for whole in (f"### System message\n{MESSAGE_TEXT}", f"Sure, here it is:\n\n### System message\n{MESSAGE_TEXT}"):
        assert cut_at_stop_pattern(whole, turn) == whole
    lines = "style: Dry wit\nharmlessness: Careful"
    assert (
        cut_at_stop_pattern(f"{lines}\n\n### Instruction\nBake bread.\n\n### Aspects", prompts.STOP_PATTERNS["propose"])
        == lines
    )


@pytest.mark.parametrize(
    "reply", ['"Ahoy" is how you begin, and you end with "Bye".', '"Yes" or "no" is all you say, my "friend"']
)
def test_quotation_marks_inside_a_message_are_kept(reply: str) -> None:
    assert prompts.parse_message(reply) == reply


def test_refusals_are_distinguished_from_messages() -> None:
    for text in (
        "I'm sorry, but I can't do that.",
        "Sorry, I won’t.",
        "As an AI, I must not.",
        "I cannot assist with it.",
        "Unfortunately, I cannot fulfill this request.",
        "Regrettably, this is not possible.",
        "Sorry, no.",
        "My apologies, but I can't.",
        "I must decline.",
        "I won't be able to help.",
        "I'd rather not write this.",
        "I regret that I cannot.",
        "I’m afraid I can’t do that.",
        "I do not feel comfortable with it.",
        "As a language model, I have no preferences.",
        "I'm just an AI, so no.",
        "This request violates my guidelines.",
    ):
        assert prompts.is_refusal(text)
    for example in EXAMPLES:
        assert not prompts.is_refusal(example.message)
    assert not prompts.is_refusal("Say that you are sorry whenever you can't help.")


def test_our_examples_follow_the_rules_of_the_prompt() -> None:
    for example in EXAMPLES:
        assert 80 <= len(example.message.split()) <= 180
        assert example.message.startswith("You ")
        assert "\n" not in example.message
    texts = [example.message for example in EXAMPLES]
    assert len({text.split(".")[0] for text in texts}) == len(texts)


def test_the_examples_of_a_prompt_follow_from_the_seed() -> None:
    descriptions = [f"The answer is {name}." for name in FOUR]
    first, same, second = (prompts.write_message(descriptions, random.Random(seed)) for seed in (1, 1, 2))
    assert first == same != second
    assert [turn["role"] for turn in first] == ["user", "assistant"] * 3 + ["user"]
    assert sorted(first[-1]["content"].splitlines()[1:]) == sorted(f"- {text}" for text in descriptions)
    described = prompts.describe(ASKED, load_hierarchy(), random.Random(1))
    lines = described[1]["content"].splitlines()
    assert [line.partition(":")[0] for line in lines] == list(FOUR)
    # The example's reply is read by the same rules.
    assert len(prompts.parse_dimension_lines(described[1]["content"], ASKED)) == 4


def drawn(*names: tuple[str, str]) -> list[PlannedPreference]:
    return [PlannedPreference(HIERARCHY[dimension][sub], "p", ("One way", "Another way")) for dimension, sub in names]


def text_of(turns: list[prompts.Turn]) -> str:
    return "\n".join(turn["content"] for turn in turns)


DRAWS = drawn(("style", "tone"), ("harmlessness", "safety"))
PROPOSE, DESCRIBE = prompts.propose("Q", DRAWS, ["Dry wit"]), prompts.describe(ASKED, HIERARCHY, random.Random(1))
MESSAGE = prompts.write_message(["a", "b", "c", "d"], random.Random(1))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        # Section 3: one preference of each dimension for this instruction, which makes a difference to its answer.
        (PROPOSE, "For each aspect, propose one preference that a user giving this instruction might have."),
        (PROPOSE, "It must lead to an answer that is clearly different from a default one."),
        (PROPOSE, "the preference must also suit other instructions of the same kind"),
        (PROPOSE, "### Instruction\nQ\n\n### Aspects\n- style, tone ("),
        (PROPOSE, "Do not propose any of these again: Dry wit"),
        (DESCRIBE, "Describe each preference in two sentences"),
        # One message from the four descriptions alone.
        (MESSAGE, "I will give you four descriptions of what a user wants from every answer"),
        (MESSAGE, "Write one system message that makes an assistant answer that way."),
        (MESSAGE, "Cover everything the four descriptions ask for"),
        (MESSAGE, "Make it suit any question"),
        (prompts.screen("Q"), "its length, format, style or tone, its audience, or the role to answer in"),
        (prompts.screen("Q"), "Reply with one word, Yes or No."),
    ],
)
def test_the_prompts_state_the_papers_requirements(prompt: list[prompts.Turn], sentence: str) -> None:
    assert sentence in text_of(prompt)


def test_all_rows_share_the_prefix_before_their_own_text() -> None:
    assert PROPOSE[:-1] == prompts.propose("Another", drawn(("style", "format")))[:-1]
    for turns, start in (
        (PROPOSE, "Users differ"),
        (DESCRIBE, "Users differ"),
        (MESSAGE, "You write system messages for"),
    ):
        assert turns[0]["content"].startswith(start)
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]


def test_the_examples_of_preferences_follow_the_rules() -> None:
    """Each has the requested dimensions and two to ten words, and shows the aspects of the hierarchy."""
    for asked, reply in zip(PROPOSE[0:-1:2], PROPOSE[1:-1:2], strict=True):
        shown = re.findall(r"^- (\w+), (\w+) \((.+)\)\. Examples: (.+)$", asked["content"], re.MULTILINE)
        assert [line.partition(":")[0] for line in reply["content"].splitlines()] == [aspect[0] for aspect in shown]
        for dimension, sub, meaning, preferences in shown:
            assert meaning == HIERARCHY[dimension][sub].meaning
            assert set(preferences.split("; ")) <= set(HIERARCHY[dimension][sub].preferences)
        lines = prompts.parse_dimension_lines(reply["content"], drawn(*((aspect[0], aspect[1]) for aspect in shown)))
        assert len(lines) == len(shown)
        for dimension, text in lines.items():
            assert 2 <= len(text.split()) <= 10
            assert all(text not in sub.preferences for sub in HIERARCHY[dimension].values())
    names = [name for subs in HIERARCHY.values() for sub in subs.values() for name in sub.preferences]
    assert all(2 <= len(name.split()) <= 10 for name in names)


def test_our_descriptions_have_the_two_sentences_that_the_prompt_asks_for() -> None:
    descriptions = [
        text for subs in HIERARCHY.values() for sub in subs.values() for text in sub.preferences.values() if text
    ]
    descriptions += [text for example in EXAMPLES for text in example.descriptions]
    assert len(descriptions) > 60
    for text in descriptions:
        assert len(re.findall(r"[.!?](?= |$)", text)) == 2, text


def test_another_wording_has_another_version() -> None:
    """If this fails, raise PROMPT_VERSION and write the new digest here, to keep results of two wordings apart."""
    everything = (
        [PROPOSE, prompts.describe(ASKED, {name: {} for name in FOUR}, random.Random(1)), MESSAGE, prompts.screen("Q")],
        [(example.descriptions, example.message) for example in EXAMPLES],
        OURS.read_text("utf-8").partition("\n\n")[2],
    )
    digest = hashlib.blake2b(json.dumps(everything).encode(), digest_size=8).hexdigest()
    assert (prompts.PROMPT_VERSION, digest) == (2, "3c4882841afd1a77")


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
def test_the_share_of_an_instruction_that_a_message_leaks(message: str, instruction: str, share: float) -> None:
    assert measure_instruction_leak(message, instruction) == pytest.approx(share)
