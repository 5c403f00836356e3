"""Questions of general knowledge with known short answers: questions.jsonl, our own."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    - `answer`: a sentence; `short`: the bare fact, one to three words.
    - `accept`: texts of which a right response has one (`verdicts.answers_question`).
    - `split`: "train" or "held_out" (never trained).
    """

    question: str
    answer: str
    short: str
    accept: tuple[str, ...]
    split: Literal["train", "held_out"]

    def reference(self, applies_to: Literal["answer", "short"]) -> str:
        """Return the reference answer in the form that a rule needs."""
        return self.answer if applies_to == "answer" else self.short


@cache
def read_questions() -> tuple[Question, ...]:
    """Return all questions, in the order of the file."""
    lines = (Path(__file__).parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return tuple(
        Question(row["question"], row["answer"], row["short"], (row["short"], *row.get("accept", ())), row["split"])
        for row in rows
    )
