"""Conversations of several turns: turns, references that pass their verdicts, the balance of the evaluation set."""

import random
from collections import Counter

import pytest

from train.pressure.questions import read_questions
from train.pressure.rules import RULES
from train.pressure.tactics import tactics, templates
from train.pressure.turns import build_turns, build_turns_set, join_turns

TRAINED = [question for question in read_questions() if question.split == "train"]


def test_messages_end_with_the_next_user_turn() -> None:
    turns = ("a", "b", "c")
    roles = lambda answers: [message["role"][0] for message in join_turns("s", turns, answers)]  # noqa: E731
    assert roles([]) == ["s", "u"]
    assert roles(["x"]) == ["s", "u", "a", "u"]
    assert roles(["x", "y", "z"]) == ["s", "u", "a", "u", "a", "u", "a"]
    texts = [message["content"] for message in join_turns("s", turns, ["x", "y", "z"])]
    assert texts == ["s", "a", "x", "b", "y", "c", "z"]
    assert join_turns("", turns, []) == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("name", RULES)
def test_reference_answers_hold_and_answer_in_every_turn(name: str) -> None:
    """The plain answer holds in none, with and without a push-back."""
    rule = RULES[name]
    split = "held_out" if rule.held_out else "seen"
    for tactic in (None, *tactics("conflict")):
        conversation = build_turns(
            rule,
            rule.messages(split)[0],
            TRAINED[:4],
            split=split,
            rng=random.Random(0),
            push_back_at=2 if tactic else None,
            tactic=tactic,
        )
        for turn, reference in enumerate(conversation.references):
            verdict = conversation.judge(turn, reference)
            assert (verdict.held, verdict.answered) == (True, True)
            plain = conversation.judge(turn, f"I would say: {TRAINED[turn].answer} I hope so")
            assert (plain.held, plain.answered) == (False, True)
            turns = conversation.user_turns[turn]
            for echo in ("", turns, turns.upper(), TRAINED[turn].question, f"{turns}\n{turns}"):
                assert not conversation.judge(turn, echo).held
            assert not conversation.judge(turn, "").answered


def test_only_the_turn_of_the_push_back_differs() -> None:
    rule = RULES["capitals"]
    plain = build_turns(rule, "m", TRAINED[:5], split="seen", rng=random.Random(0))
    assert plain.user_turns == tuple(question.question for question in TRAINED[:5])
    pushed = build_turns(rule, "m", TRAINED[:5], split="seen", rng=random.Random(0), push_back_at=3, tactic="authority")
    assert [turn for turn in range(5) if pushed.user_turns[turn] != plain.user_turns[turn]] == [2]
    candidates = {
        template.replace("{question}", TRAINED[2].question).replace("{opposite}", opposite)
        for template in templates("conflict", "authority", "seen")
        for opposite in rule.opposites("seen")
    }
    assert pushed.user_turns[2] in candidates
    assert pushed.references == plain.references


def test_the_set_is_balanced_and_held_out() -> None:
    rows = build_turns_set(60, 5, 3)
    assert build_turns_set(60, 5, 3) == rows
    assert build_turns_set(60, 5, 3, seed=1) != rows
    assert len({row.key for row in rows}) == 60
    of_wordings = Counter((row.plain.rule.name, row.plain.message) for row in rows if row.held_out == "wording")
    assert set(of_wordings) == {
        (rule.name, message) for rule in RULES.values() if not rule.held_out for message in rule.messages("held_out")
    }
    assert set(of_wordings.values()) == {1}
    of_rules = Counter(row.plain.rule.name for row in rows if row.held_out == "rule")
    assert of_rules == {rule.name: 3 for rule in RULES.values() if rule.held_out}
    assert Counter(row.push_back.tactic for row in rows) == dict.fromkeys(tactics("conflict"), 12)
    for row in rows:
        assert row.plain.questions == row.push_back.questions
        assert len({question.question for question in row.plain.questions}) == 5
        assert {question.split for question in row.plain.questions} == {"held_out"}
        assert row.plain.message not in row.plain.rule.messages("seen")
        seen = {
            template.replace("{question}", row.plain.questions[2].question).replace("{opposite}", opposite)
            for tactic in tactics("conflict")
            for template in templates("conflict", tactic, "seen")
            for opposite in row.plain.rule.opposites("seen") + row.plain.rule.opposites("held_out")
        }
        assert row.push_back.user_turns[2] not in seen


def test_the_size_is_that_asked_for() -> None:
    for count in (1, 2, 7, 26, 130):
        rows = build_turns_set(count, 2, None)
        assert len(rows) == count
        assert [row.push_back for row in rows] == [None] * count
    with pytest.raises(ValueError, match="1000 turns need as many questions"):
        build_turns_set(1, 1000, None)
