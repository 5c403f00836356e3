"""Write the quickstart's data, train.jsonl and held_out.jsonl, from the rules and questions of train/pressure.

    python recipes/smollm2-135m/data/build.py [--output FOLDER]

As in Multifaceted Collection (Lee et al. 2024, arXiv:2405.17977) each training question has three different system
messages, so the form of the answer never follows from the question alone. held_out.jsonl has two kinds of rows, all
with questions that train.jsonl lacks: "wording" (a trained rule in a wording that is never trained) and "rule" (a rule
that is never trained). The output is reproducible to the byte.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES, Rule

HERE = Path(__file__).parent
SYSTEM_MESSAGES_PER_QUESTION = 3
HELD_OUT_QUESTIONS = 36
HELD_OUT_RULE_ROWS = 30
NEVER_TRAINED = ("opening_hear_ye", "signature_otto")

Row = dict[str, Any]


def make_row(rule: Rule, wording: str, question: Question) -> Row:
    """Return a conversation: system message, question and a reference answer that obeys the rule."""
    answer = rule.apply(question.question, question.reference(rule.applies_to))
    contents = {"system": wording, "user": question.question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()], "rule": rule.name}


def shuffled(items: Sequence[str], generator: random.Random) -> list[str]:
    """Return the items in random order."""
    return generator.sample(items, len(items))


def deal(
    rules: Sequence[Rule], questions: Sequence[Question], generator: random.Random
) -> Iterator[tuple[Rule, Question]]:
    """Yield three rules for each question, dealt from a deck that is reshuffled when it runs out.

    The deck is a multiple of a hand, so a question never gets a rule twice and all rules are used equally often.
    """
    if len(rules) % SYSTEM_MESSAGES_PER_QUESTION:
        raise ValueError(f"{len(rules)} rules cannot be dealt in hands of {SYSTEM_MESSAGES_PER_QUESTION}")
    deck: list[Rule] = []
    for question in questions:
        if not deck:
            deck = generator.sample(rules, len(rules))
        for _ in range(SYSTEM_MESSAGES_PER_QUESTION):
            yield deck.pop(), question


def build(seed: int = 0) -> dict[str, list[Row]]:
    """Return the rows by file name. The wordings of a rule take turns, so that all are used about equally often."""
    generator = random.Random(seed)
    questions: dict[str, list[Question]] = {"train": [], "held_out": []}
    for question in read_questions():
        questions[question.split].append(question)
    del questions["held_out"][HELD_OUT_QUESTIONS:]  # the rest is for the evaluations under pressure alone
    trained = [rule for rule in RULES.values() if not rule.held_out]
    never_trained = [RULES[name] for name in NEVER_TRAINED]

    turns = {
        rule.name: cycle(shuffled(rule.messages("held_out" if rule.held_out else "seen"), generator))
        for rule in (*trained, *never_trained)
    }
    train = [
        make_row(rule, next(turns[rule.name]), question)
        for rule, question in deal(trained, questions["train"], generator)
    ]
    generator.shuffle(train)

    held_out_turns = {rule.name: cycle(rule.messages("held_out")) for rule in trained}
    held_out = [
        make_row(rule, next(held_out_turns[rule.name]), question) | {"held_out": "wording"}
        for rule, question in deal(trained, questions["held_out"], generator)
    ]
    held_out += [
        make_row(rule, next(turns[rule.name]), question) | {"held_out": "rule"}
        for rule, question in zip(
            cycle(never_trained), generator.sample(questions["held_out"], HELD_OUT_RULE_ROWS), strict=False
        )
    ]
    return {"train.jsonl": train, "held_out.jsonl": held_out}


def main() -> None:
    """Write both files and print their numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="output folder (default: that of this script)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
