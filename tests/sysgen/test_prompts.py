"""Prompts of SYSGEN: the paper's requirements, a prefix that servers can cache, examples that follow the rules."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from scripted_model import EIGHT
from sysgen_runs import only_row, question, run_with, saying

from train.datagen import constraints
from train.datagen.language import detect_language
from train.sysgen import prompts
from train.sysgen.filters import measure_answer_leak
from train.sysgen.tags import parse, parse_verdicts
from train.sysgen.verdicts import parse_reply_verdicts

SHORT = question("Why is the sky blue?", "Rayleigh scattering.")["messages"]
LONG = question("Hi.", "Hello!")["messages"] + SHORT
TAGGED = parse("<<Format>>Write a list.<</Format>><<Role>>You are a tester.<</Role>>")

MEANT = {
    "Role": ("role", "profession", "identity"),
    "Content": ("must include",),
    "Task": ("do",),
    "Action": ("behave", "proceed"),
    "Style": ("sound",),
    "Background": ("setting",),
    "Tool": ("built-in", "external"),
    "Format": ("shape",),
}


def text_of(turns: list[dict[str, str]]) -> str:
    return "\n".join(turn["content"] for turn in turns)


@pytest.mark.parametrize("prompt", [text_of(prompts.generate(SHORT)), text_of(prompts.verify(TAGGED))])
def test_the_eight_tags_are_defined_in_canonical_order(prompt: str) -> None:
    lines = [line for line in prompt.splitlines() if line.startswith(tuple(f"- {tag}: " for tag in EIGHT))]
    assert [line[2:].partition(":")[0] for line in lines] == list(EIGHT)
    for line, words in zip(lines, MEANT.values(), strict=True):
        assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        # Section 3.1: a message for which the answer is a fitting one, every phrase in a tag, in the same language.
        (prompts.generate(SHORT), "An assistant that received your message should naturally give the answers shown"),
        (prompts.generate(SHORT), "Put each phrase between an opening and a closing tag, <<Tag>>phrase<</Tag>>"),
        (prompts.generate(SHORT), "using one of these eight tags"),
        (prompts.generate(SHORT), "in the language of the conversation"),
        (prompts.generate(SHORT), "Write nothing outside the tags"),
        # Section 3.3: Good, Bad or None for each of the eight, from the definitions and both forms of the message.
        (prompts.verify(TAGGED), "Judge for each of the eight tags whether it is used as defined"),
        (prompts.verify(TAGGED), "- None: no phrase has this tag, or its phrases say nothing of substance"),
        (prompts.verify(TAGGED), "### The system message\nYou are a tester. Write a list.\n"),
        (prompts.verify(TAGGED), f"### The system message with tags\n{TAGGED.render()}"),
        # The gate of ours.
        (prompts.judge("S", "Q", "A"), "Reply with one word, Yes or No."),
    ],
)
def test_the_prompts_state_the_papers_requirements(prompt: list[dict[str, str]], sentence: str) -> None:
    assert sentence in text_of(prompt)


def test_an_existing_message_and_reminders_come_after_the_conversation() -> None:
    plain, more = prompts.generate(SHORT), prompts.generate(SHORT, existing="Be brief.", remind_of=["Tool", "Style"])
    assert more[:-1] == plain[:-1]
    added = more[-1]["content"].removeprefix(plain[-1]["content"])
    assert added != more[-1]["content"]
    places = [added.index(text) for text in ("Be brief.", "keep everything it asks for", "<<Tool>>", "<<Style>>")]
    assert places == sorted(places)


def test_all_rows_share_the_prefix_before_their_own_text() -> None:
    short, long = prompts.generate(SHORT), prompts.generate(LONG)
    assert short[:-1] == long[:-1]
    assert [turn["role"] for turn in short] == ["user", "assistant"] * 3 + ["user"]
    judged, of_another = (text_of(prompts.verify(message)) for message in (TAGGED, parse("<<Task>>Count.<</Task>>")))
    shared = next(at for at, (a, b) in enumerate(zip(judged, of_another, strict=False)) if a != b)
    assert judged[:shared].rstrip().endswith("### The system message")


def test_the_examples_follow_the_rules_of_the_prompt() -> None:
    turns = prompts.generate(SHORT)
    tags: set[str] = set()
    languages = set()
    for asked, written in itertools.pairwise(turns[:-1]):
        if asked["role"] != "user":
            continue
        message = parse(written["content"])
        assert (message.dropped, message.repairs) == ((), {})
        assert message.render() == written["content"]  # nothing outside, in canonical order
        conversation = asked["content"].rpartition("conversation:\n\n")[2]
        languages.add(detect_language(message.text))
        assert detect_language(message.text) in (detect_language(conversation), None)
        questions, answers = ("\n".join(turns_of(conversation, role)) for role in ("User", "Assistant"))
        assert measure_answer_leak(message.text, questions, answers) == 0
        tags |= set(message.tags)
    assert tags == set(EIGHT)
    assert len(languages - {None}) == 2
    assert any(turn["content"].count("### Assistant") > 1 for turn in turns)


def turns_of(conversation: str, role: str) -> list[str]:
    turns = [turn.partition("\n") for turn in f"\n\n{conversation}".split("\n\n### ")[1:]]
    return [text for name, _, text in turns if name == role]


def test_the_prompts_form_of_verdicts_is_parsed() -> None:
    prompt = prompts.verify(TAGGED)[0]["content"]
    form = "\n".join(line for line in prompt.partition("###")[0].splitlines() if line.startswith("<<"))
    assert parse_reply_verdicts(form).of == {}  # a reply that repeats it judges nothing
    read = parse_verdicts(form.replace("Bad", "Good", 1))
    assert set(read.of) == set(EIGHT)
    assert set(read.of.values()) == {"Good", "Bad", "None"}


@pytest.mark.parametrize(("leak", "there"), [(0.5, True), (None, False)])
def test_without_the_gate_the_prompt_asks_only_what_the_paper_asks(
    tmp_path: Path, leak: float | None, there: bool
) -> None:
    """Neither that the message suits other questions nor that it keeps the answer secret."""
    _, asked = run_with(saying(), tmp_path, [question()], gates={"leak": leak})
    first = asked[0].body["messages"][0]["content"]
    for sentence in ("must not give the answer away", "work just as well for other questions of the same kind"):
        assert (sentence in first) == there
    assert "  " not in first.partition("```")[0]
    assert ("answers shown, and the message" if there else "answers shown.\n") in first


@pytest.mark.parametrize("after", [["and then?"], ["and then?", "please"]])
def test_turns_after_the_last_answer_are_removed_and_counted(tmp_path: Path, after: list[str]) -> None:
    longer = {"messages": question()["messages"] + [{"role": "user", "content": text} for text in after]}
    done, asked = run_with(saying(), tmp_path, [longer])
    assert done.stats.events["turns after the last answer left out"] == 1
    assert "| turns after the last answer left out | 1 |" in done.report.read_text("utf-8")
    assert [turn["role"] for turn in only_row(tmp_path)["messages"]] == ["system", "user", "assistant"]
    assert not any(text in turn["content"] for text in after for request in asked for turn in request.body["messages"])
    (tmp_path / "plain").mkdir()
    done, _ = run_with(saying(), tmp_path / "plain", [question(system="Be brief.")])
    assert "turns after the last answer left out" not in done.stats.events


def test_the_report_names_the_version_of_the_prompts(tmp_path: Path) -> None:
    done, _ = run_with(saying(), tmp_path, [question()])
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["prompt_version"] == prompts.PROMPT_VERSION
    assert f"Prompt version: {prompts.PROMPT_VERSION}." in done.report.read_text("utf-8")


def test_another_wording_has_another_version() -> None:
    """If this fails, raise PROMPT_VERSION and write the new digest here, to keep results of two wordings apart."""
    everything: list[Any] = [
        [
            prompts.generate(LONG, existing="X", remind_of=EIGHT, forbid_leak=forbid_leak)
            for forbid_leak in (True, False)
        ],
        [prompts.verify(TAGGED), prompts.verify(TAGGED, SHORT), prompts.judge("S", "Q", "A")],
        [(kind.name, kind.tag, constraints._load_wordings()[kind.name]["wordings"]) for kind in constraints._KINDS],
        [constraints._AVOIDABLE, constraints._BEGINNINGS, constraints._ENDINGS],
    ]
    digest = hashlib.blake2b(json.dumps(everything).encode(), digest_size=8).hexdigest()
    assert (prompts.PROMPT_VERSION, digest) == (2, "3409a364d465e425")
