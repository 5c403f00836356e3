"""Conversations of several turns under one rule, with or without a turn in which the user asks to drop it.

    system  the rule's message
    user    a question                      assistant  an answer that obeys
    user    a question                      assistant  ...
    user    a question, "stop doing that"   <- push_back_at=3: the message holds here, and in all later turns
    user    a question                      assistant  ...

`write_user_turns` and `join_turns` work on text alone, for rows of the data pipelines.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from train.pressure.conversations import Message
from train.pressure.evaluation_set import Verdict, obeys_rule
from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES, Rule, Split
from train.pressure.tactics import fill, tactics, templates
from train.pressure.verdicts import answers_question, is_echo, is_refusal

VERSION = 3
"""Version of the evaluation set. Raise it with every change of conversations or verdicts."""

HeldOut = Literal["wording", "rule"]
"""wording = a trained rule in a message that is never trained; rule = a rule that is never trained."""


@dataclass(frozen=True)
class TurnsConversation:
    """A rule's message and one user turn for each question.

    - `push_back_at`: the turn, from 1, in which the user asks to drop the rule; None without one.
    - `tactic`: the tactic of that turn (`tactics("conflict")`).
    """

    rule: Rule
    message: str
    questions: tuple[Question, ...]
    user_turns: tuple[str, ...]
    push_back_at: int | None = None
    tactic: str = ""

    @property
    def references(self) -> list[str]:
        """The reference answers, which all obey the rule."""
        return [
            self.rule.apply(question.question, question.reference(self.rule.applies_to)) for question in self.questions
        ]

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """Return the conversation with its first answers: up to the next user turn, or complete with all answers."""
        return join_turns(self.message, self.user_turns, answers)

    def judge(self, turn: int, response: str) -> Verdict:
        """Return the verdicts on the response in a turn, counted from 0."""
        question = self.questions[turn]
        user_turn = self.user_turns[turn]
        held = obeys_rule(self.rule, question.question, user_turn, response)
        held = held and not is_echo(response, question.question, (self.message, user_turn))
        answered = answers_question(response, question.accept)
        return Verdict(held, answered, is_refusal(response) and not (held and answered))


def build_turns(
    rule: Rule,
    message: str,
    questions: Sequence[Question],
    *,
    split: Split,
    rng: random.Random,
    push_back_at: int | None = None,
    tactic: str | None = None,
) -> TurnsConversation:
    """Return a conversation with one turn for each question; arguments as of `write_user_turns`."""
    tactic = (tactic or rng.choice(tactics("conflict"))) if push_back_at else ""
    user_turns = write_user_turns(
        [question.question for question in questions],
        opposites=rule.opposites(split),
        split=split,
        rng=rng,
        push_back_at=push_back_at,
        tactic=tactic,
    )
    return TurnsConversation(rule, message, tuple(questions), user_turns, push_back_at, tactic)


def write_user_turns(
    questions: Sequence[str],
    *,
    opposites: Sequence[str],
    split: Split,
    rng: random.Random,
    push_back_at: int | None,
    tactic: str,
) -> tuple[str, ...]:
    """Return the user's turns.

    Args:
        questions: the question of each turn.
        opposites: sentences that ask for the opposite of the rule.
        split: part of the templates that is used.
        rng: source of all choices.
        push_back_at: the turn, from 1, that also asks for the opposite; None = no turn does.
        tactic: the tactic of that turn.
    """
    turns = list(questions)
    if push_back_at is not None:
        values = {"question": questions[push_back_at - 1], "opposite": rng.choice(opposites)}
        turns[push_back_at - 1] = fill(rng.choice(templates("conflict", tactic, split)), values)
    return tuple(turns)


def join_turns(message: str, user_turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """Return system message, user turns and answers in turn, up to the user turn after the last answer."""
    messages: list[Message] = [{"role": "system", "content": message}] if message else []
    for turn, text in enumerate(user_turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": text})
        messages += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
    return messages


@dataclass(frozen=True)
class TurnsRow:
    """A conversation of the evaluation set without and with a push-back; all else is equal.

    `push_back`: None where the set is built without one.
    """

    key: str
    held_out: HeldOut
    plain: TurnsConversation
    push_back: TurnsConversation | None


def build_turns_set(count: int, turns: int, push_back_at: int | None, seed: int = 0) -> list[TurnsRow]:
    """Return the conversations of the evaluation set; the same arguments give the same conversations.

    Three of five state a trained rule in a held-out message, two a held-out rule. Rules, their messages and the tactics
    of the push-back take turns. With 60 conversations each of the 36 held-out messages of trained rules occurs once,
    and each of the 8 held-out rules in 3 messages. Questions are held out, and differ within a conversation.

    Raises ValueError if there are fewer held-out questions than turns.
    """
    rng = random.Random(seed)
    questions = [question for question in read_questions() if question.split == "held_out"]
    if turns > len(questions):
        raise ValueError(f"{turns} turns need as many questions, and only {len(questions)} are held out")
    pushes = cycle(tactics("conflict"))
    deck: list[Question] = []
    rows: list[TurnsRow] = []
    kinds: dict[HeldOut, int] = {"wording": round(0.6 * count)}
    kinds["rule"] = count - kinds["wording"]
    for held_out, size in kinds.items():
        rules = [rule for rule in RULES.values() if rule.held_out == (held_out == "rule")]
        order = rng.sample(rules, len(rules))
        for number in range(size):
            rule, times = order[number % len(order)], number // len(order)
            messages = rule.messages("held_out")
            if len(deck) < turns:
                deck = rng.sample(questions, len(questions))
            asked = [deck.pop() for _ in range(turns)]
            message = messages[times % len(messages)]
            plain = build_turns(rule, message, asked, split="held_out", rng=rng)
            push_back = None
            if push_back_at:
                push_back = build_turns(
                    rule, message, asked, split="held_out", rng=rng, push_back_at=push_back_at, tactic=next(pushes)
                )
            rows.append(TurnsRow(f"{rule.name}/{times}", held_out, plain, push_back))
    return rows
