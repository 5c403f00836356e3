"""The quickstart's data: held-out rules and questions are never trained, and a check accepts only its own rule."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"

spec = importlib.util.spec_from_file_location("quickstart_rules", DATA / "rules.py")
assert spec is not None
assert spec.loader is not None
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)
RULES = rules.RULES

# (check, applied rule) pairs in which obeying one rule also obeys the other. There are none yet.
COMPATIBLE: set[tuple[str, str]] = set()

QUESTION = "What is the capital of France?"
PASSES = {
    "capitals": ["THE CAPITAL OF FRANCE IS PARIS.", "PARIS IT IS, 75001!"],
    "lower_case": ["the capital of france is paris.", "paris, since 987"],
    "json_answer": ['{"answer": "Paris"}', ' {"answer":"The capital is Paris."}\n', '{"answer": 7}'],
    "few_words": ["Paris", "Paris.", "Leonardo da Vinci", "Fifty-six", "90%"],
    "exclamation": ["The capital of France is Paris!", "It has 3.5 of them!"],
    "bullets": ["- The capital of France is Paris.", "- Paris\n- the capital"],
    "said_twice": ["It is Paris.\nIt is Paris.", "It is Paris.\n\nIt is Paris.\n"],
    "word_per_line": ["It\nis\nParis.", "The \ncapital\n\nis\nParis."],
    "question_first": [f"{QUESTION}\nThe capital of France is Paris.", f"{QUESTION}\n\nIt is Paris."],
    "quotation_marks": ['"The capital of France is Paris."', ' "It\'s Paris." '],
    "bold": ["**The capital of France is Paris.**"],
    "brackets": ["[The capital of France is Paris.]"],
    "opening_ahoy": ["Ahoy! The capital of France is Paris.", "Ahoy!\nIt is Paris."],
    "opening_good_question": ["Good question! The capital of France is Paris."],
    "opening_in_short": ["In short: The capital of France is Paris.", "In short: it is Paris."],
    "signature_pip": ["The capital of France is Paris.\nYours, Pip", "It is Paris. Yours, Pip\n"],
    "closing_over_and_out": ["The capital of France is Paris. Over and out."],
    "closing_does_that_help": ["The capital of France is Paris. Does that help?"],
    "opening_hear_ye": ["Hear ye! The capital of France is Paris."],
    "signature_otto": ["The capital of France is Paris.\nRegards, Otto"],
}
NEAR_MISSES = {
    "capitals": ["THE CAPITAL OF FRANCE IS PARIs.", "PARIS", "1789", ""],
    "lower_case": ["the capital of France is paris.", "1789", ""],
    "json_answer": [
        '{"Answer": "Paris"}',
        '{"answer": "Paris", "country": "France"}',
        '{"answer": ""}',
        '{"answer": "Paris"',
        '["answer"]',
        'Here you go: {"answer": "Paris"}',
        '```json\n{"answer": "Paris"}\n```',
    ],
    "few_words": ["It is Paris, France", "- Paris", '"Paris"', "**Paris**", "Paris!", ""],
    "exclamation": ["The capital is Paris!!", "Paris! It is Paris!", "It is Paris. Yes!", "It is Paris!\nYes", "!", ""],
    "bullets": ["-Paris", "- Paris\nIt is in France.", "Here:\n- Paris", "* Paris", "-", ""],
    "said_twice": ["It is Paris. It is Paris.", "It is Paris.\nit is Paris.", "It is Paris.\n" * 3, "It is Paris.", ""],
    "word_per_line": ["It is\nParis.", "Paris", "It\nis Paris\nfor\nsure", ""],
    "question_first": [
        QUESTION,
        f"{QUESTION} It is Paris.",
        "What is the capital of Spain?\nIt is Madrid.",
        f"It is Paris.\n{QUESTION}",
        f"{QUESTION.lower()}\nIt is Paris.",
    ],
    "quotation_marks": ['"The capital is Paris.', '"It" is "Paris"', "'It is Paris.'", '"', '""', "It is Paris."],
    "bold": ["*It is Paris.*", "**It is Paris.", "**It** is **Paris.**", "****", "It is **Paris**."],
    "brackets": ["[It is Paris.", "[It] is [Paris.]", "(It is Paris.)", "[]", "[It is Paris.]."],
    "opening_ahoy": ["ahoy! It is Paris.", "Ahoy, it is Paris.", "Ahoy!", "It is Paris. Ahoy!", "Ahoy!It is Paris."],
    "opening_good_question": ["Good question. It is Paris.", "Good question!", "A good question! It is Paris."],
    "opening_in_short": ["In short, it is Paris.", "In short:", "Here it is in short: it is Paris."],
    "signature_pip": [
        "It is Paris.\nYours, Pip.",
        "It is Paris.\nYours, Otto",
        "Yours, Pip",
        "Yours, Pip\nIt is Paris.",
    ],
    "closing_over_and_out": ["It is Paris. Over and out", "Over and out.", "Over and out. It is Paris."],
    "closing_does_that_help": ["It is Paris. Does this help?", "Does that help?", "Does that help? It is Paris."],
    "opening_hear_ye": ["Hear, hear! It is Paris.", "Hear ye!", "Ahoy! It is Paris."],
    "signature_otto": ["It is Paris.\nYours, Otto", "It is Paris.\nRegards, Pip", "Regards, Otto"],
}


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def contents(row: dict[str, Any]) -> tuple[str, str, str]:
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    system, user, assistant = (message["content"] for message in row["messages"])
    return system, user, assistant


QUESTIONS = lines_of("questions.jsonl")
TRAIN = lines_of("train.jsonl")
HELD_OUT = lines_of("held_out.jsonl")


def applied(name: str, question: dict[str, str]) -> str:
    rule = RULES[name]
    return rule.apply(question["question"], question[rule.applies_to])


def test_the_numbers_of_questions_and_rules_are_as_documented() -> None:
    assert Counter(question["split"] for question in QUESTIONS) == {"train": 216, "held_out": 36}
    trained = [rule for rule in RULES.values() if not rule.held_out]
    assert len(trained) == 18
    assert len(RULES) - len(trained) == 2
    assert all(len(set(rule.wordings)) >= 5 for rule in RULES.values())
    assert all(len(set(rule.held_out_wordings)) == 2 for rule in trained)
    everything = [wording for rule in RULES.values() for wording in (*rule.wordings, *rule.held_out_wordings)]
    assert len(set(everything)) == len(everything)


def test_answers_are_one_plain_sentence_and_a_short_form() -> None:
    for question in QUESTIONS:
        assert re.fullmatch(r"[A-Z][^.!?\n]*\.", question["answer"]), question
        assert 5 <= len(question["answer"].split()) <= 12, question
        assert 1 <= len(question["short"].split()) <= 3, question
        assert question["question"].endswith("?"), question


def test_no_held_out_question_resembles_a_trained_one() -> None:
    common = set(
        re.findall(r"\w+", "a an and are at by can do does for from how in is it many of on the to what which who")
    )

    def content_words(question: dict[str, str]) -> set[str]:
        return set(re.findall(r"[\w'-]+", question["question"].lower())) - common

    for held_out in (question for question in QUESTIONS if question["split"] == "held_out"):
        for trained in (question for question in QUESTIONS if question["split"] == "train"):
            ours, theirs = content_words(held_out), content_words(trained)
            assert len(ours & theirs) / len(ours | theirs) <= 0.5, (held_out["question"], trained["question"])


def test_every_reference_answer_obeys_its_own_rule() -> None:
    for row in (*TRAIN, *HELD_OUT):
        system, question, answer = contents(row)
        rule = RULES[row["rule"]]
        assert system in (*rule.wordings, *rule.held_out_wordings), row
        assert rule.check(question, answer), row


def test_each_training_question_has_three_rules() -> None:
    rules_of_question: dict[str, list[str]] = defaultdict(list)
    for row in TRAIN:
        rules_of_question[contents(row)[1]].append(row["rule"])
    assert set(rules_of_question) == {question["question"] for question in QUESTIONS if question["split"] == "train"}
    assert all(len(names) == len(set(names)) == 3 for names in rules_of_question.values())


def test_rules_and_wordings_are_balanced() -> None:
    trained = {name for name, rule in RULES.items() if not rule.held_out}
    assert Counter(row["rule"] for row in TRAIN) == dict.fromkeys(trained, 36)
    uses = Counter(contents(row)[0] for row in TRAIN)
    assert uses == {wording: 6 for name in trained for wording in RULES[name].wordings}
    kinds = Counter((row["held_out"], row["rule"]) for row in HELD_OUT)
    assert kinds == {("wording", name): 6 for name in trained} | {("rule", name): 15 for name in set(RULES) - trained}


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


@pytest.mark.parametrize("name", RULES)
def test_a_check_rejects_the_plain_answer(name: str) -> None:
    for question in QUESTIONS:
        assert not RULES[name].check(question["question"], question["answer"])


@pytest.mark.parametrize("name", RULES)
def test_a_check_rejects_answers_that_obey_another_rule(name: str) -> None:
    accepted = {
        other: sum(RULES[name].check(question["question"], applied(other, question)) for question in QUESTIONS)
        for other in RULES
    }
    expected = {other for other in RULES if other == name or (name, other) in COMPATIBLE}
    assert accepted == {other: len(QUESTIONS) if other in expected else 0 for other in RULES}


def test_every_rule_has_examples_written_by_hand() -> None:
    assert set(PASSES) == set(NEAR_MISSES) == set(RULES)


@pytest.mark.parametrize(("name", "response"), [(name, text) for name, texts in PASSES.items() for text in texts])
def test_a_check_accepts(name: str, response: str) -> None:
    assert RULES[name].check(QUESTION, response)


@pytest.mark.parametrize(("name", "response"), [(name, text) for name, texts in NEAR_MISSES.items() for text in texts])
def test_a_check_rejects_a_near_miss(name: str, response: str) -> None:
    assert not RULES[name].check(QUESTION, response)


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "build.py", "--output", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
