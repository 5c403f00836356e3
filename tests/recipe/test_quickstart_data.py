"""The quickstart's data: held-out rules and questions are never trained, and a check accepts only its own rule."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from train.pressure.questions import read_questions
from train.pressure.rules import RULES

DATA = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def contents(row: dict[str, Any]) -> tuple[str, str, str]:
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    system, user, assistant = (message["content"] for message in row["messages"])
    return system, user, assistant


TRAIN = lines_of("train.jsonl")
HELD_OUT = lines_of("held_out.jsonl")


def test_every_reference_answer_obeys_its_own_rule() -> None:
    for row in (*TRAIN, *HELD_OUT):
        system, question, answer = contents(row)
        rule = RULES[row["rule"]]
        assert system in (*rule.messages("seen"), *rule.messages("held_out")), row
        assert rule.check(question, answer), row


def test_each_training_question_has_three_rules() -> None:
    rules_of_question: dict[str, list[str]] = defaultdict(list)
    for row in TRAIN:
        rules_of_question[contents(row)[1]].append(row["rule"])
    assert set(rules_of_question) == {question.question for question in read_questions() if question.split == "train"}
    assert all(len(names) == len(set(names)) == 3 for names in rules_of_question.values())


def test_rules_and_wordings_are_balanced() -> None:
    trained = {name for name, rule in RULES.items() if not rule.held_out}
    assert Counter(row["rule"] for row in TRAIN) == dict.fromkeys(trained, 36)
    uses = Counter(contents(row)[0] for row in TRAIN)
    assert uses == {wording: 6 for name in trained for wording in RULES[name].messages("seen")}
    kinds = Counter((row["held_out"], row["rule"]) for row in HELD_OUT)
    assert kinds == {("wording", name): 6 for name in trained} | {
        ("rule", name): 15 for name in ("opening_hear_ye", "signature_otto")
    }


def test_held_out_rules_wordings_and_questions_are_never_trained() -> None:
    trained_systems = {contents(row)[0] for row in TRAIN}
    trained_questions = {contents(row)[1] for row in TRAIN}
    trained_answers = {contents(row)[2] for row in TRAIN if RULES[row["rule"]].applies_to == "answer"}
    trained_rules = {row["rule"] for row in TRAIN}
    for row in HELD_OUT:
        system, question, answer = contents(row)
        assert system not in trained_systems
        assert question not in trained_questions
        assert answer not in trained_answers or RULES[row["rule"]].applies_to == "short"
        assert (row["rule"] in trained_rules) == (row["held_out"] == "wording")
    text = (DATA / "train.jsonl").read_text(encoding="utf-8")
    for phrase in ("Hear ye", "Otto", "Regards"):
        assert phrase not in text


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "build.py", "--output", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
