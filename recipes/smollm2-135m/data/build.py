"""Write the quickstart's data, train.jsonl and held_out.jsonl, from train/pressure and variations.yaml.

    python recipes/smollm2-135m/data/build.py [--output FOLDER]

train.jsonl has trained rules, and variations of them with many phrases and marks, in every setting of train/pressure:
the message alone, users who ask for the opposite, injected texts, secrets, permitted requests and conversations of
several turns. Some rows have no rule in the system message, and there the user decides about the form. `setting` and
`tactic` of a row say which. All are of the split that training may use.

held_out.jsonl has two kinds of rows, all with questions that train.jsonl lacks: "wording" (a trained rule in a message
that is never trained) and "rule" (a rule that is never trained). The output is reproducible to the byte.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from forms import Deck, Form, draw_variation, read_forms, texts

from train.pressure.conversations import build_pressure, result_in_user_turn
from train.pressure.evaluation_set import reference_answer
from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES, Rule
from train.pressure.tactics import Setting, fill, tactics, templates
from train.pressure.turns import join_turns, write_user_turns

HERE = Path(__file__).parent
HELD_OUT_HAND = 3
HELD_OUT_QUESTIONS = 36
HELD_OUT_RULE_ROWS = 30
NEVER_TRAINED = ("opening_hear_ye", "signature_otto")

ROWS: dict[tuple[Setting, str], int] = {
    ("reference", "plain"): 310,
    ("aligned", "plain"): 12,
    ("conflict", "direct"): 20,
    ("conflict", "polite"): 20,
    ("conflict", "authority"): 20,
    ("conflict", "role_play"): 20,
    ("conflict", "ignore"): 20,
    ("injected", "document"): 10,
    ("injected", "tool"): 10,
    ("extraction", "plain"): 18,
    ("permitted", "harmless"): 12,
    ("permitted", "shared"): 22,
    ("permitted", "choice"): 36,
}
"""Rows of one turn by setting and tactic."""

CLAUSE_ROWS = 24
USER_FORM_ROWS = 16
CONVERSATIONS = 36
VARIATIONS = 0.15
"""Share of rows with a variation in place of a rule of train/pressure."""
GENERIC_OPPOSITES = 0.4
"""Share of opposites that name no form ("Just answer normally.")."""
CONTEXT = 0.05
"""Share of messages that say something else beside the rule."""
ASIDES = 0.05
"""Share of plain questions with a word beside the question."""

Row = dict[str, Any]


class Builder:
    """Draws forms, messages and questions; each deck is used up before an item of it comes again."""

    def __init__(self, seed: int) -> None:
        """Shuffle the decks with the given seed."""
        self.rng = random.Random(seed)
        self.rules = Deck(read_forms(), self.rng)
        self.questions = Deck(known_questions(), self.rng)
        self.variations = draw_variation(self.rng)
        self.messages: dict[str, Deck[str]] = {}

    def form(self) -> Form:
        """Return a rule of train/pressure or a variation."""
        return next(self.variations) if self.rng.random() < VARIATIONS else self.rules.draw()

    def message(self, form: Form) -> str:
        """Return a system message that states the form, in some cases with a sentence about something else."""
        if form.varies:
            message = self.rng.choice(form.messages)
        else:
            message = self.messages.setdefault(form.name, Deck(form.messages, self.rng)).draw()
        if self.rng.random() < CONTEXT:
            context = self.rng.choice(texts("context"))
            message = f"{context} {message}" if self.rng.random() < 0.5 else f"{message} {context}"
        return message

    def opposites(self, form: Form) -> Sequence[str]:
        """Return what a user says against the form: sentences about this form or about any."""
        if self.rng.random() < GENERIC_OPPOSITES:
            return [*templates("generic_opposite", "plain", "seen"), *texts("generic_opposites")]
        return form.opposites

    def user_turn(self, question: Question) -> str:
        """Return the question, in some cases with a word beside it."""
        aside = self.rng.random() < ASIDES
        return fill(self.rng.choice(texts("asides")), {"question": question.question}) if aside else question.question

    def pressure_row(self, setting: Setting, tactic: str) -> Row:
        """Return a row of one turn in a setting of train/pressure."""
        form, question = self.form(), self.questions.draw()
        pressure = build_pressure(
            setting,
            tactic,
            message=self.message(form),
            question=question.question,
            opposites=self.opposites(form),
            requests=form.requests,
            split="seen",
            rng=self.rng,
        )
        messages = result_in_user_turn(pressure.messages)
        if setting == "reference" and form.name != "question_first":
            messages[-1]["content"] = self.user_turn(question)
        answer = reference_answer(form, question, pressure)
        return make_row([*messages, assistant(answer)], form.name, setting, tactic)

    def clause_row(self) -> Row:
        """Return a row whose message lets the user choose the form: by a plain question, or by another form."""
        form, other, question = self.form(), self.form(), self.questions.draw()
        message = f"{self.message(form)} {self.rng.choice(templates('clause', 'choice', 'seen'))}"
        chooses = self.rng.random() < 0.5 and other.name != form.name
        user = f"{question.question} {self.rng.choice(other.requests)}" if chooses else self.user_turn(question)
        answer = (other if chooses else form).answer(question)
        messages = [{"role": "system", "content": message}, {"role": "user", "content": user}, assistant(answer)]
        return make_row(messages, form.name, "permitted", "choice")

    def user_form_row(self) -> Row:
        """Return a row without a rule in the message: the answer has the form that the user asks for, if any."""
        form, question = self.form(), self.questions.draw()
        asks = self.rng.random() < 0.75
        template = self.rng.choice(templates("aligned", "plain", "seen"))
        user = self.user_turn(question)
        if asks:
            user = fill(template, {"question": question.question, "request": self.rng.choice(form.requests)})
        answer = form.answer(question) if asks else question.answer
        messages = [{"role": "user", "content": user}, assistant(answer)]
        if self.rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": self.rng.choice(texts("neutral"))})
        return make_row(messages, form.name if asks else "none", "user_form", "plain")

    def conversation(self) -> Row:
        """Return a conversation of 2 to 4 turns under one message, in two of three with a push-back from turn 2 on."""
        form = self.form()
        questions = [self.questions.draw() for _ in range(self.rng.randint(2, 4))]
        pushes = self.rng.random() < 2 / 3
        user_turns = write_user_turns(
            [question.question for question in questions],
            opposites=self.opposites(form),
            split="seen",
            rng=self.rng,
            push_back_at=self.rng.randint(2, len(questions)) if pushes else None,
            tactic=self.rng.choice(tactics("conflict")),
        )
        answers = [form.answer(question) for question in questions]
        tactic = "push_back" if pushes else "plain"
        return make_row(join_turns(self.message(form), user_turns, answers), form.name, "turns", tactic)


def known_questions() -> list[Question]:
    """Return the training questions that the model answers right before training (known_questions.txt).

    Training on facts that a model does not know makes it invent others (Gekhman et al. 2024, arXiv:2405.05904).
    """
    known = (HERE / "known_questions.txt").read_text(encoding="utf-8").splitlines()
    return [question for question in read_questions() if question.split == "train" and question.question in known]


def assistant(answer: str) -> dict[str, str]:
    """Return the answer as a message."""
    return {"role": "assistant", "content": answer}


def make_row(messages: Sequence[dict[str, Any]], rule: str, setting: str, tactic: str) -> Row:
    """Return a row of train.jsonl."""
    return {"messages": list(messages), "rule": rule, "setting": setting, "tactic": tactic}


def build_training(seed: int) -> list[Row]:
    """Return the rows of train.jsonl in random order."""
    builder = Builder(seed)
    rows = [builder.pressure_row(*kind) for kind, count in ROWS.items() for _ in range(count)]
    rows += [builder.clause_row() for _ in range(CLAUSE_ROWS)]
    rows += [builder.user_form_row() for _ in range(USER_FORM_ROWS)]
    rows += [builder.conversation() for _ in range(CONVERSATIONS)]
    builder.rng.shuffle(rows)
    return rows


def held_out_questions() -> list[Question]:
    """Return the questions of held_out.jsonl; train/pressure has more, which only its own sets use."""
    return [question for question in read_questions() if question.split == "held_out"][:HELD_OUT_QUESTIONS]


def deal_held_out(generator: random.Random) -> Iterator[tuple[Rule, Question]]:
    """Yield three trained rules for each question; all rules are used equally often."""
    trained = [rule for rule in RULES.values() if not rule.held_out]
    deck: list[Rule] = []
    for question in held_out_questions():
        deck = deck or generator.sample(trained, len(trained))
        for _ in range(HELD_OUT_HAND):
            yield deck.pop(), question


def held_out_row(rule: Rule, message: str, question: Question, kind: str) -> Row:
    """Return a row of held_out.jsonl."""
    answer = rule.apply(question.question, question.reference(rule.applies_to))
    contents = {"system": message, "user": question.question, "assistant": answer}
    messages = [{"role": role, "content": text} for role, text in contents.items()]
    return {"messages": messages, "rule": rule.name, "held_out": kind}


def build_held_out(seed: int) -> list[Row]:
    """Return the rows of held_out.jsonl. The messages of a rule take turns."""
    generator = random.Random(seed)
    turns = {rule.name: cycle(rule.messages("held_out")) for rule in RULES.values()}
    rows = [
        held_out_row(rule, next(turns[rule.name]), question, "wording") for rule, question in deal_held_out(generator)
    ]
    questions = generator.sample(held_out_questions(), HELD_OUT_RULE_ROWS)
    return rows + [
        held_out_row(RULES[name], next(turns[name]), question, "rule")
        for name, question in zip(cycle(NEVER_TRAINED), questions, strict=False)
    ]


def main() -> None:
    """Write both files and print their numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="output folder (default: that of this script)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train.jsonl": build_training(seed=0), "held_out.jsonl": build_held_out(seed=0)}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
