"""Forms of answers that the quickstart trains: the rules of train/pressure and variations of them.

A form is a rule and the texts that training may use about it. Each phrase or mark of a family of variations.yaml makes
a form, whose `rule` has a name such as "prefix: >".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from train.pressure.questions import Question
from train.pressure.rules import (
    RULES,
    Rule,
    closing_rule,
    has_words,
    json_rule,
    opening_rule,
    split_lines,
    wrapper_rule,
)

_HARDER = ("capitals", "lower_case", "quotation_marks")
"""Trained rules that a small model learns slowly: twice as many rows."""
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@dataclass(frozen=True)
class Form:
    """A rule with its system messages, and what users say against it (`opposites`) and for it (`requests`).

    `family`: the family of variations.yaml, or the name of the trained rule.
    """

    family: str
    rule: Rule
    messages: tuple[str, ...]
    opposites: tuple[str, ...]
    requests: tuple[str, ...]

    def suits(self, question: Question) -> bool:
        """Return whether the question has an answer that obeys the rule, and its plain answer breaks the rule."""
        text = question.question
        obeys = self.rule.check(text, self.rule.apply(text, question.reference(self.rule.applies_to)))
        return obeys and (not self.messages or not self.rule.check(text, question.answer))


@dataclass(frozen=True)
class Family:
    """Forms that differ in their phrase or mark. `share`: rows of the family, relative to other families."""

    name: str
    forms: tuple[Form, ...]
    share: int = 1


def trained_rules() -> list[Family]:
    """Return the trained rules of train/pressure, with their texts of the split `seen`: each is a family of its own."""
    return [
        Family(rule.name, (_as_form(rule.name, rule, rule.messages("seen")),), 2 if rule.name in _HARDER else 1)
        for rule in RULES.values()
        if not rule.held_out
    ]


def read_variations() -> list[Family]:
    """Return the families of variations.yaml."""
    return [_family(name, texts) for name, texts in _read_texts()["families"].items()]


def messages_without_rule() -> list[str]:
    """Return system messages that state no rule; "" = none."""
    return list(_read_texts()["without_rule"])


@cache
def _read_texts() -> dict[str, Any]:
    texts: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "variations.yaml").read_text(encoding="utf-8"))
    return texts


def _family(name: str, texts: dict[str, Any]) -> Family:
    forms = []
    for value in texts.get("values", [""]):
        opening, _, closing = value.partition(" ")
        fields = {"{value}": value.strip(), "{open}": opening, "{close}": closing}
        lines = {
            key: tuple(_fill(line, fields) for line in texts.get(key, ()))
            for key in ("wordings", "opposites", "requests")
        }
        rule = _RULES_OF[name](f"{name}: {value.strip()}" if value else name, value)
        forms.append(_as_form(name, rule, **lines))
    return Family(name, tuple(forms), texts.get("share", 1))


def _as_form(
    family: str, rule: Rule, wordings: tuple[str, ...], opposites: tuple[str, ...] = (), requests: tuple[str, ...] = ()
) -> Form:
    return Form(family, rule, wordings, opposites or rule.opposites("seen"), requests or rule.requests("seen"))


def _fill(text: str, fields: dict[str, str]) -> str:
    for field, value in fields.items():
        text = text.replace(field, value)
    return text


# The rules of the families


def _wrapper(name: str, pair: str) -> Rule:
    return wrapper_rule(name, *pair.split())


def _prefix(name: str, mark: str) -> Rule:
    def check(question: str, response: str) -> bool:
        lines = split_lines(response)
        return bool(lines) and all(line.startswith(f"{mark} ") and has_words(line.removeprefix(mark)) for line in lines)

    return Rule(name, "prefix", lambda question, answer: f"{mark} {answer}", check)


def _most_words(name: str, limit: str) -> Rule:
    most = NUMBERS[limit.split()[0]]
    return Rule(
        name,
        "length",
        apply=lambda question, answer: answer,
        check=lambda question, response: has_words(response) and len(response.split()) <= most,
        applies_to="short",
    )


def _same_as(rule: str) -> Callable[[str, str], Rule]:
    """Return the maker of a family that states a rule of train/pressure in other words."""
    return lambda name, _: RULES[rule]


_RULES_OF: dict[str, Callable[[str, str], Rule]] = {
    "opening": opening_rule,
    "closing": closing_rule,
    "signature": lambda name, phrase: closing_rule(name, phrase, separator="\n"),
    "wrapper": _wrapper,
    "prefix": _prefix,
    "json_key": json_rule,
    "most_words": _most_words,
    "upper_case": _same_as("capitals"),
    "small_letters": _same_as("lower_case"),
    "question_above": _same_as("question_first"),
    "one_word_lines": _same_as("word_per_line"),
}
"""Family -> function that makes the rule of a name and a value."""

PLAIN = Form("none", Rule("none", "none", lambda question, answer: answer, lambda question, answer: True), (), (), ())
"""The form of a plain answer."""
