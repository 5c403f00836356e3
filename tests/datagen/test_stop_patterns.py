"""Stop patterns: replies are cut where the model invents a further turn of the prompt."""

from pathlib import Path

import pytest
from scripted_server import Asked, Reply, said
from sysgen_runs import good_everything, only_row, question, run_with

from train.datagen.stop_patterns import cut_at_stop_pattern
from train.llm.yes_or_no import says_no
from train.sysgen.prompts import STOP_PATTERNS
from train.sysgen.tags import parse, parse_verdicts

REPLY = "<<Role>>You are a teacher.<</Role>>\n<<Style>>Be brief.<</Style>>"
INVENTED_TURN = {
    "the prompt's own words": "The next conversation:\n\n### User\nBread?\n\n### Assistant\nMix.\n<<Task>>Bake.<</Task>>",
    "the user's heading": "### User\nHow do I bake bread?\n\n### Assistant\nMix.\n\n<<Task>>Bake.<</Task>>",
    "the assistant's": "### Assistant\n<<Task>>Bake.<</Task>>",
    "the system's": "### System message\n<<Task>>Bake.<</Task>>",
    "bold": "**The next conversation:**\n\n**User:** Bread?\n<<Task>>Bake.<</Task>>",
    "without marks": "User: How do I bake bread?\nAssistant: Mix.\n<<Task>>Bake.<</Task>>",
    "another level": "## User:\nBread?\n<<Task>>Bake.<</Task>>",
    "Human": "Human: Bread?\n\n<<Task>>Bake.<</Task>>",
}
WHOLE = {
    "a heading before the phrases": f"### System message\n{REPLY}",
    "a lead-in and a heading": f"Sure!\n\n### Assistant\n{REPLY}",
    "the conversation repeated before": f"### User\nBread?\n\n### Assistant\nMix.\n\n{REPLY}",
    "headings in a phrase": "<<Role>>r<</Role>><<Format>>Write it so:\n### User\nhi\n### Assistant\nho<</Format>>",
    "a word at the start of a line": f"{REPLY}\nUsers like it.\n<<Task>>t<</Task>>",
}


@pytest.mark.parametrize("made_up", INVENTED_TURN.values(), ids=INVENTED_TURN)
def test_a_message_ends_where_an_invented_turn_begins(made_up: str) -> None:
    assert cut_at_stop_pattern(f"{REPLY}\n\n{made_up}", STOP_PATTERNS["generate"]) == REPLY


@pytest.mark.parametrize("reply", WHOLE.values(), ids=WHOLE)
def test_headings_that_begin_no_invented_turn(reply: str) -> None:
    assert cut_at_stop_pattern(reply, STOP_PATTERNS["generate"]) == reply
    assert parse(cut_at_stop_pattern(reply, STOP_PATTERNS["generate"])).phrases


def test_verdicts_and_judgements_end_there_too() -> None:
    reply = "<<Role>>: Good\n<<Task>>: Bad"
    for heading in ("### The system message", "### Part of the conversation it was written for", "### User"):
        own = cut_at_stop_pattern(f"{reply}\n\n{heading}\nx\n<<Role>>: Bad\n<<Tool>>: Good", STOP_PATTERNS["verify"])
        assert parse_verdicts(own).of == {"Role": "Good", "Task": "Bad"}
    assert (
        cut_at_stop_pattern(f"### System message\n{reply}", STOP_PATTERNS["verify"]) == f"### System message\n{reply}"
    )
    for heading in ("### System message\nBe brief.", "### Question\nBread?", "### Answer\nMix."):
        assert says_no(cut_at_stop_pattern(f"No.\n\n{heading}\n\nYes", STOP_PATTERNS["judge"])) is True


def test_cuts_are_counted_and_an_answer_may_have_such_lines(tmp_path: Path) -> None:
    answer = "Write it so:\n\n### User\nhi\n\n### Assistant\nho"

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        text = f"{text}\n\n### User\nx\n<<Task>>made up<</Task>>" if text.startswith("<<Role>>You") else text
        return said(answer) if text == "a fine new answer" else said(text, "length" if "made up" in text else "stop")

    done, _ = run_with(script, tmp_path, [question()])
    assert [turn["content"] for turn in only_row(tmp_path)["messages"][::2]] == ["You are a tester.", answer]
    event = "generate: made up a further turn of the prompt, and was cut there"
    assert done.stats.events[event] == 1
    assert "system message cut at the token limit" not in done.stats.events
    assert f"| {event} | 1 |" in done.report.read_text("utf-8")
