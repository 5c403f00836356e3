"""Forms of answers that the quickstart trains: trained rules of train/pressure and the families of variations.yaml."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml

from train.pressure.questions import Question
from train.pressure.rules import RULES

WEIGHTS = {
    "opening": 5,
    "closing": 5,
    "signature": 2,
    "both_ends": 1,
    "wrapper": 4,
    "line_start": 3,
    "line_end": 3,
    "joined": 3,
    "json_key": 1,
    "three_times": 1,
    "title_case": 1,
}
"""Frequency of the families of variations.yaml."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Form:
    """A form of answers: system messages that ask for it, what users say for and against it, and the change it makes.

    `varies`: it is one of many of its family.
    """

    name: str
    messages: tuple[str, ...]
    opposites: tuple[str, ...]
    requests: tuple[str, ...]
    apply: Callable[[str, str], str]
    applies_to: Literal["answer", "short"] = "answer"
    varies: bool = False

    def answer(self, question: Question) -> str:
        """Return the reference answer in this form."""
        return self.apply(question.question, question.reference(self.applies_to))


class Deck(Generic[Item]):
    """Items in random order; it is shuffled again when it runs out."""

    def __init__(self, items: Sequence[Item], rng: random.Random) -> None:
        """Keep the items."""
        self._items, self._rng = list(items), rng
        self._left: list[Item] = []

    def draw(self) -> Item:
        """Return the next item."""
        if not self._left:
            self._left = self._rng.sample(self._items, len(self._items))
        return self._left.pop()


@cache
def _read() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "variations.yaml").read_text(encoding="utf-8"))
    return content


def texts(name: str) -> tuple[str, ...]:
    """Return a list of variations.yaml, such as `context`."""
    return tuple(_read()[name])


def read_forms() -> list[Form]:
    """Return the trained rules of train/pressure, with the parts that training may use.

    Each is there as often as it should be drawn. Rules that add a phrase are relatives of each other and of the
    families of variations.yaml; those about the case of all letters took longest to learn.
    """
    return [
        Form(
            rule.name,
            rule.messages("seen"),
            rule.opposites("seen"),
            rule.requests("seen"),
            rule.apply,
            rule.applies_to,
        )
        for rule in RULES.values()
        for _ in range(2 if rule.phrase else 4 if rule.family == "case" else 3)
        if not rule.held_out
    ]


def draw_variation(rng: random.Random) -> Iterator[Form]:
    """Yield variations without end: families by their weights, the values of a family in turn."""
    decks = {
        (family, names): Deck(values, rng) for family in WEIGHTS for names, values in _read()[family]["values"].items()
    }
    while True:
        [family] = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))
        values: dict[str, str] = {}
        for names in _read()[family]["values"]:
            drawn = decks[family, names].draw()
            values |= zip(names.split(", "), [drawn] if isinstance(drawn, str) else drawn, strict=True)
        yield make_variation(family, values)


def make_variation(family: str, values: dict[str, str]) -> Form:
    """Return the variation of a family with the given phrase or mark."""
    content = _read()[family]
    messages, opposites, requests = (
        tuple(text.format(**values) for text in content[kind]) for kind in ("messages", "opposites", "requests")
    )

    def apply(question: str, answer: str) -> str:
        stem = answer.removesuffix(".")
        fields = {
            "answer": answer,
            "stem": stem,
            "short": json.dumps(answer, ensure_ascii=False)[1:-1],
            "words": values.get("mark", " ").join(stem.split()),
            "title": " ".join(word[:1].upper() + word[1:] for word in answer.split()),
        }
        return str(content["apply"].format(**fields, **values))

    applies_to: Literal["answer", "short"] = "short" if "{short}" in content["apply"] else "answer"
    return Form(family, messages, opposites, requests, apply, applies_to, varies=True)
