"""Write the quickstart's data, train.jsonl and held_out.jsonl, from the rules and questions of train/pressure.

    python recipes/smollm2-135m/data/build.py [--output FOLDER] [--rows N]

train.jsonl: half of its rows state one of the 18 trained rules, half a variation of one (variations.yaml), in the
conversations of SHARES. A question has other rules each time, so the form of the answer never follows from the question
alone, as in Multifaceted Collection (Lee et al. 2024, arXiv:2405.17977). held_out.jsonl has two kinds of rows, all with
questions that train.jsonl lacks: "wording" (a trained rule in a wording that is never trained) and "rule" (a rule that
is never trained). The output is reproducible to the byte.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from forms import PLAIN, Form, messages_without_rule, read_variations, trained_rules

from train.pressure.conversations import build_pressure, result_in_user_turn
from train.pressure.evaluation_set import reference_answer
from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES, Rule
from train.pressure.tactics import tactics, templates
from train.pressure.turns import join_turns, write_user_turns

HERE = Path(__file__).parent
ROWS = 1250
SHARES = {
    "single": 0.40,  # a question under a rule
    "aligned": 0.03,  # the user asks for the same as the message
    "permitted": 0.15,  # a form that the user may choose (half), harmless words, a code that may be told
    "conflict": 0.165,  # the user asks for the opposite, by all tactics in turn, or as in a permitted row
    "injected": 0.02,  # a document or a search result asks for the opposite
    "extraction": 0.03,  # the user asks for a secret
    "without_rule": 0.045,  # no system message, or one without a rule: the answer is plain
    "turns": 0.08,  # three to five questions under a rule
    "turns_push_back": 0.08,  # the same, and one turn asks for the opposite
}
"""Kind of conversation -> share of the rows."""
SETTINGS = {"single": "reference", "without_rule": "reference", "turns": "conflict", "turns_push_back": "conflict"}
"""Kind of conversation -> setting of train/pressure whose tactics it has, where the names differ."""
DEALT = {"permitted": ("choice", "choice", "harmless", "shared")}
"""Kind of conversation -> its tactics, where some are used more often than others."""
TURNS = (3, 4, 5)
KNOWN: Path | None = None
"""File of the questions to train on, one per line, so that training teaches no facts; None = all training questions."""
HELD_OUT_QUESTIONS = 36
HELD_OUT_RULE_ROWS = 30
NEVER_TRAINED = ("opening_hear_ye", "signature_otto")

Row = dict[str, Any]
Item = TypeVar("Item")


class Example(NamedTuple):
    """A row of train.jsonl, the form of its last answer and the question that this answers."""

    row: Row
    form: Form
    question: Question


def shuffled(items: Sequence[Item], generator: random.Random) -> list[Item]:
    """Return the items in random order."""
    return generator.sample(items, len(items))


class Deck:
    """Items that are dealt in random order, again and again, so that all are used about equally often."""

    def __init__(self, items: Sequence[Any], generator: random.Random) -> None:
        self._items, self._generator = items, generator
        self._deck: list[Any] = []

    def deal(self, suits: Callable[[Any], bool] = lambda item: True) -> Any:
        """Return and remove the first item that suits. Raises ValueError if none of all items does."""
        for _ in range(2):
            for place, item in enumerate(self._deck):
                if suits(item):
                    return self._deck.pop(place)
            self._deck += shuffled(self._items, self._generator)
        raise ValueError("no item suits")


class FormDealer:
    """Deals forms with one of their messages: a trained rule and a variation by turns, of one family after another."""

    def __init__(self, generator: random.Random) -> None:
        self._families, self._forms, self._messages = [], {}, {}
        for families in (trained_rules(), read_variations()):
            self._families.append(Deck([family for family in families for _ in range(family.share)], generator))
            for family in families:
                self._forms[family.name] = Deck(family.forms, generator)
                self._messages[family.name] = Deck(range(len(family.forms[0].messages)), generator)
        self._sources = cycle(self._families)

    def deal(self) -> tuple[Form, str]:
        """Return the next form and the message that states it."""
        family = next(self._sources).deal()
        form = self._forms[family.name].deal()
        return form, form.messages[self._messages[family.name].deal()]


class QuestionDealer:
    """Deals questions that suit a form and had another one before."""

    def __init__(self, questions: Sequence[Question], generator: random.Random) -> None:
        self._deck = Deck(questions, generator)
        self._used: set[tuple[str, str]] = set()

    def deal(self, form: Form) -> Question:
        """Return the next question for a form. A form that has had all questions that suit it starts again."""
        name = form.rule.name
        try:
            question = self._deck.deal(lambda item: (item.question, name) not in self._used and form.suits(item))
        except ValueError:
            self._used -= {use for use in self._used if use[1] == name}
            question = self._deck.deal(form.suits)
        self._used.add((question.question, name))
        return question


def training_questions() -> list[Question]:
    """Return the questions to train on."""
    known = set(KNOWN.read_text(encoding="utf-8").splitlines()) if KNOWN else None
    questions = [question for question in read_questions() if question.split == "train"]
    return [question for question in questions if known is None or question.question in known]


def build_train(rows: int, generator: random.Random) -> list[Example]:
    """Return the training rows with their forms and questions, in random order."""
    forms = FormDealer(generator)
    questions = QuestionDealer(training_questions(), generator)
    plain_messages = Deck(messages_without_rule(), generator)
    turns = Deck(TURNS, generator)
    train: list[Example] = []
    for kind, share in SHARES.items():
        names = Deck(DEALT.get(kind) or tactics(SETTINGS.get(kind, kind)), generator)
        twins = sum(example.row["kind"] == kind for example in train)
        for _ in range(round(share * rows) - twins):
            if kind == "without_rule":
                question = questions.deal(PLAIN)
                row = make_row(kind, PLAIN, "", plain_messages.deal(), [question.question], [question.answer])
                train.append(Example(row, PLAIN, question))
                continue
            form, message = forms.deal()
            tactic = names.deal()
            if kind.startswith("turns"):
                asked = [questions.deal(form) for _ in range(turns.deal())]
                row = make_turns(kind, form, message, asked, tactic, generator)
                train.append(Example(row, form, asked[-1]))
                continue
            question = questions.deal(form)
            row = make_pressure(kind, form, message, question, tactic, generator)
            train.append(Example(row, form, question))
            if tactic == "choice":
                train.append(Example(make_twin(row, form, message, question), form, question))
    generator.shuffle(train)
    return train


def make_pressure(
    kind: str, form: Form, message: str, question: Question, tactic: str, generator: random.Random
) -> Row:
    """Return a row of one user turn."""
    pressure = build_pressure(
        SETTINGS.get(kind, kind),
        tactic,
        message=message,
        question=question.question,
        opposites=opposites_of(form, generator),
        requests=form.requests,
        split="seen",
        rng=generator,
    )
    system, user = result_in_user_turn(pressure.messages)  # the chat template has no turns of tools
    answer = reference_answer(form.rule, question, pressure)
    return make_row(kind, form, tactic, system["content"], [user["content"]], [answer])


def make_twin(row: Row, form: Form, message: str, question: Question) -> Row:
    """Return a row whose message lets the user choose, without that sentence: the user asks the same, in vain."""
    answer = form.rule.apply(question.question, question.reference(form.rule.applies_to))
    return make_row("conflict", form, "direct", message, [row["messages"][1]["content"]], [answer])


def make_turns(
    kind: str, form: Form, message: str, questions: Sequence[Question], tactic: str, generator: random.Random
) -> Row:
    """Return a row of several user turns; one after the first asks for the opposite if the kind says so."""
    push_back_at = generator.randint(2, len(questions)) if kind == "turns_push_back" else None
    tactic = tactic if push_back_at else ""
    user_turns = write_user_turns(
        [question.question for question in questions],
        opposites=opposites_of(form, generator),
        split="seen",
        rng=generator,
        push_back_at=push_back_at,
        tactic=tactic,
    )
    rule = form.rule
    answers = [rule.apply(question.question, question.reference(rule.applies_to)) for question in questions]
    return make_row(kind, form, tactic, message, user_turns, answers)


def opposites_of(form: Form, generator: random.Random) -> list[str]:
    """Return what users say against a form, and one sentence against any form."""
    return [*form.opposites, generator.choice(templates("generic_opposite", "plain", "seen"))]


def make_row(
    kind: str, form: Form, tactic: str, message: str, user_turns: Sequence[str], answers: Sequence[str]
) -> Row:
    """Return a row of train.jsonl."""
    messages = join_turns(message, user_turns, answers)
    return {"messages": messages, "rule": form.family, "kind": kind, "tactic": tactic}


def make_held_out_row(rule: Rule, wording: str, question: Question) -> Row:
    """Return a row of held_out.jsonl: system message, question and a reference answer that obeys the rule."""
    answer = rule.apply(question.question, question.reference(rule.applies_to))
    return {"messages": join_turns(wording, [question.question], [answer]), "rule": rule.name}


def deal_three(
    rules: Sequence[Rule], questions: Sequence[Question], generator: random.Random
) -> Iterator[tuple[Rule, Question]]:
    """Yield three rules for each question; a question never gets a rule twice, and all are used equally often."""
    if len(rules) % 3:
        raise ValueError(f"{len(rules)} rules cannot be dealt in hands of 3")
    deck: list[Rule] = []
    for question in questions:
        if not deck:
            deck = generator.sample(rules, len(rules))
        for _ in range(3):
            yield deck.pop(), question


def build_held_out(seed: int = 0) -> list[Row]:
    """Return the held-out rows."""
    generator = random.Random(seed)
    questions = [question for question in read_questions() if question.split == "held_out"][:HELD_OUT_QUESTIONS]
    trained = [rule for rule in RULES.values() if not rule.held_out]
    never_trained = [RULES[name] for name in NEVER_TRAINED]
    turns = {
        rule.name: cycle(shuffled(rule.messages("held_out" if rule.held_out else "seen"), generator))
        for rule in (*trained, *never_trained)
    }
    # The generator goes on behind the draws of a former train.jsonl, so that the held-out rows stay comparable.
    training = [question for question in read_questions() if question.split == "train"]
    generator.shuffle(list(deal_three(trained, training, generator)))

    held_out_turns = {rule.name: cycle(rule.messages("held_out")) for rule in trained}
    rows = [
        make_held_out_row(rule, next(held_out_turns[rule.name]), question) | {"held_out": "wording"}
        for rule, question in deal_three(trained, questions, generator)
    ]
    asked = generator.sample(questions, HELD_OUT_RULE_ROWS)
    return rows + [
        make_held_out_row(rule, next(turns[rule.name]), question) | {"held_out": "rule"}
        for rule, question in zip(cycle(never_trained), asked, strict=False)
    ]


def build(rows: int = ROWS, seed: int = 0) -> dict[str, list[Row]]:
    """Return the rows by file name."""
    train = [example.row for example in build_train(rows, random.Random(seed))]
    return {"train.jsonl": train, "held_out.jsonl": build_held_out(seed)}


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write both files; print their numbers of rows, and those of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="output folder (default: that of this script)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of train.jsonl, about (default {ROWS})")
    options = parser.parse_args()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in build(options.rows).items():
        write_rows(folder / name, rows)
        counts = Counter(row.get("kind") or f"held-out {row['held_out']}" for row in rows)
        print(f"{folder / name}: {len(rows)} rows: {', '.join(f'{kind} {count}' for kind, count in counts.items())}")


if __name__ == "__main__":
    main()
