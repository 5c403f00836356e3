"""The quickstart's data: reference answers obey, and nothing that is held out is trained."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES
from train.pressure.tactics import SECRET_NAMES, SETTINGS, secret_words, tactics
from train.pressure.verdicts import answers_question, is_refusal, reveals

DATA = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"
PRESSURE = Path(__file__).parents[2] / "train" / "pressure"
SECRET = re.compile(r"[a-z]+-\d{4}")
HELD_OUT_RULES = [rule for rule in RULES.values() if rule.held_out]

Row = dict[str, Any]


def lines_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def load_forms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forms", DATA / "forms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


TRAIN = lines_of("train.jsonl")
HELD_OUT = lines_of("held_out.jsonl")
FORMS = load_forms()
QUESTIONS = {split: [item for item in read_questions() if item.split == split] for split in ("train", "held_out")}


def system_of(row: Row) -> str:
    messages = row["messages"]
    return str(messages[0]["content"]) if messages[0]["role"] == "system" else ""


def exchanges(row: Row) -> list[tuple[str, str]]:
    """Return the pairs of user turn and answer."""
    turns = [message for message in row["messages"] if message["role"] != "system"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [(user["content"], answer["content"]) for user, answer in zip(turns[::2], turns[1::2], strict=True)]


def question_in(user: str) -> Question:
    """Return the training question of a turn."""
    return max((item for item in QUESTIONS["train"] if item.question in user), key=lambda item: len(item.question))


def rows_of(setting: str, tactic: str | None = None) -> list[Row]:
    rows = [row for row in TRAIN if row["setting"] == setting and tactic in (None, row["tactic"])]
    assert rows
    return rows


def literals(template: str) -> list[str]:
    """Return the parts of a template between its fields that say something."""
    return [part.strip() for part in re.split(r"\{\w+\}", template) if len(part.split()) >= 3]


def held_out_texts() -> Iterator[str]:
    """Yield every text of train/pressure that training must not hold."""
    yield from (item.question for item in QUESTIONS["held_out"])
    for rule in RULES.values():
        yield from (*rule.messages("held_out"), *rule.opposites("held_out"), *rule.requests("held_out"))
        if rule.held_out and rule.phrase:
            yield rule.phrase
    for of_tactic in yaml.safe_load((PRESSURE / "tactics.yaml").read_text(encoding="utf-8")).values():
        for split in of_tactic.values():
            yield from (part for template in split["held_out"] for part in literals(template))
    yield from SECRET_NAMES["held_out"]
    yield from (f"{word}-" for word in secret_words("held_out"))


def test_nothing_held_out_is_trained() -> None:
    text = "\n".join(message["content"] for row in TRAIN for message in row["messages"])
    assert [held_out for held_out in held_out_texts() if held_out in text] == []
    assert not {row["rule"] for row in TRAIN} & {rule.name for rule in HELD_OUT_RULES}


def test_no_variation_is_a_held_out_rule() -> None:
    """No answer of any family in any of its values obeys a held-out rule."""
    families = yaml.safe_load((DATA / "variations.yaml").read_text(encoding="utf-8"))
    count = 0
    for family in FORMS.WEIGHTS:
        for names, values in families[family]["values"].items():
            for value in values:
                pairs = zip(names.split(", "), [value] if isinstance(value, str) else value, strict=True)
                fields = {name: other[0] for name, other in families[family]["values"].items()} | dict(pairs)
                form = FORMS.make_variation(family, fields)
                for item in QUESTIONS["train"][:20]:
                    answer = form.answer(item)
                    obeyed = [rule.name for rule in HELD_OUT_RULES if rule.check(item.question, answer)]
                    assert obeyed == [], (family, fields, answer)
                    assert answers_question(answer, item.accept), (family, fields, answer)
                    count += 1
    assert count > 3000


@pytest.mark.parametrize("setting", [*SETTINGS, "turns", "user_form"])
def test_every_answer_has_the_fact_in_the_form_of_its_rule(setting: str) -> None:
    for row in rows_of(setting):
        if row["tactic"] in ("shared", "choice"):
            continue
        for user, answer in exchanges(row):
            question = question_in(user)
            assert answers_question(answer, question.accept), row
            assert not is_refusal(answer)
            if rule := RULES.get(row["rule"]):
                assert rule.check(question.question, answer), row


def test_every_setting_and_tactic_is_trained() -> None:
    expected = {(setting, tactic) for setting in SETTINGS for tactic in tactics(setting)}
    expected |= {("user_form", "plain"), ("turns", "plain"), ("turns", "push_back")}
    assert {(row["setting"], row["tactic"]) for row in TRAIN} == expected
    assert {row["rule"] for row in TRAIN} == {
        *(rule.name for rule in RULES.values() if not rule.held_out), *FORMS.WEIGHTS, "none"
    }  # fmt: skip


def test_users_ask_for_the_opposite_in_a_later_turn_and_the_rule_goes_on() -> None:
    for row in rows_of("turns", "push_back"):
        longer = [user for user, _ in exchanges(row) if user != question_in(user).question]
        assert len(longer) == 1
        assert exchanges(row)[0][0] not in longer
    assert all(user == question_in(user).question for row in rows_of("turns", "plain") for user, _ in exchanges(row))


def test_a_secret_is_kept_and_a_code_that_may_be_shared_is_told() -> None:
    for row in rows_of("extraction"):
        [secret] = SECRET.findall(system_of(row))
        assert not reveals(exchanges(row)[0][1], secret)
    for row in rows_of("permitted", "shared"):
        [secret] = SECRET.findall(system_of(row))
        assert reveals(exchanges(row)[0][1], secret)


def test_a_user_who_may_choose_the_form_gets_it() -> None:
    """Of the rows whose message lets the user choose, some users do so and some do not."""
    obeys = Counter()  # type: ignore[var-annotated]
    for row in rows_of("permitted", "choice"):
        if rule := RULES.get(row["rule"]):
            [(user, answer)] = exchanges(row)
            question = question_in(user)
            plain = len(user.split()) <= len(question.question.split()) + 4
            obeys[rule.check(question.question, answer)] += 1
            assert not rule.check(question.question, answer) or plain, row
    assert min(obeys[True], obeys[False]) >= 5


def test_held_out_rows_obey_their_rule_in_a_held_out_message() -> None:
    trained = {name for name, rule in RULES.items() if not rule.held_out}
    kinds = Counter((row["held_out"], row["rule"]) for row in HELD_OUT)
    assert kinds == {("wording", name): 6 for name in trained} | {
        ("rule", name): 15 for name in ("opening_hear_ye", "signature_otto")
    }
    for row in HELD_OUT:
        [(user, answer)] = exchanges(row)
        assert system_of(row) in RULES[row["rule"]].messages("held_out")
        assert user in {item.question for item in QUESTIONS["held_out"]}
        assert RULES[row["rule"]].check(user, answer), row


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "build.py", "--output", tmp_path], check=True, capture_output=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
