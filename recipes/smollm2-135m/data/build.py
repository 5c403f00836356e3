"""Write the quickstart's data, train.jsonl and held_out.jsonl, from questions.jsonl and rules.py.

    python recipes/smollm2-135m/data/build.py [--output FOLDER]

As in Multifaceted Collection (Lee et al. 2024, arXiv:2405.17977) every training question comes under three different
system messages, so the question alone never tells which form the answer takes. held_out.jsonl has two kinds of rows,
all with questions that train.jsonl lacks: "wording" (a trained rule in words never trained) and "rule" (a rule never
trained). Everything follows from one seed: the same command writes the same bytes.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rules import RULES, Rule

HERE = Path(__file__).parent
SYSTEM_MESSAGES_PER_QUESTION = 3
HELD_OUT_RULE_ROWS = 30

Question = dict[str, str]
Row = dict[str, Any]


def row(rule: Rule, wording: str, question: Question) -> Row:
    """One conversation: the rule in the given words, the question, the reference answer that obeys."""
    answer = rule.apply(question["question"], question[rule.applies_to])
    contents = {"system": wording, "user": question["question"], "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()], "rule": rule.name}


def shuffled(items: Sequence[str], generator: random.Random) -> list[str]:
    """The items in another order."""
    return generator.sample(items, len(items))


def deal(
    rules: Sequence[Rule], questions: Sequence[Question], generator: random.Random
) -> Iterator[tuple[Rule, Question]]:
    """Deal each question its rules, from a deck reshuffled whenever it runs out.

    As the deck is a multiple of a hand, a question never gets a rule twice, and all rules are dealt equally often.
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
    """File name -> its rows. Each rule's wordings take turns, so that all are seen about equally often."""
    generator = random.Random(seed)
    lines = (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions: dict[str, list[Question]] = {"train": [], "held_out": []}
    for question in map(json.loads, lines):
        questions[question["split"]].append(question)
    trained = [rule for rule in RULES.values() if not rule.held_out]
    never_trained = [rule for rule in RULES.values() if rule.held_out]

    turns = {rule.name: cycle(shuffled(rule.wordings, generator)) for rule in RULES.values()}
    train = [
        row(rule, next(turns[rule.name]), question) for rule, question in deal(trained, questions["train"], generator)
    ]
    generator.shuffle(train)

    held_out_turns = {rule.name: cycle(rule.held_out_wordings) for rule in trained}
    held_out = [
        row(rule, next(held_out_turns[rule.name]), question) | {"held_out": "wording"}
        for rule, question in deal(trained, questions["held_out"], generator)
    ]
    held_out += [
        row(rule, next(turns[rule.name]), question) | {"held_out": "rule"}
        for rule, question in zip(
            cycle(never_trained), generator.sample(questions["held_out"], HELD_OUT_RULE_ROWS), strict=False
        )
    ]
    return {"train.jsonl": train, "held_out.jsonl": held_out}


def main() -> None:
    """Write both files and say how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="where to write (default: beside this script)")
    folder: Path = parser.parse_args().output
    for name, rows in build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
