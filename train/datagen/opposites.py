"""Checks of the opposites of constraints: an answer does what a user asks for against a constraint.

Where a constraint is strict, breaking it is not enough: nine bullets break "two bullets" and are no running text. The
other kinds are not here: an answer that breaks "at most 60 words" has more than 60.
"""

import re
from collections.abc import Callable, Mapping

from train.datagen.text_units import BULLET, HEADING, NUMBERED, split_words

Values = Mapping[str, str]
"""Values of a constraint: `n`, `word`, `phrase`."""


def has_opposite_form(kind: str, values: Values, answer: str) -> bool:
    """Return whether an answer that breaks a constraint does what each of the kind's opposites asks for.

    The opposites are those of constraints.yaml. True for a kind whose opposite is that it is broken.
    """
    return kind not in _OPPOSITES or _OPPOSITES[kind](answer.strip(), values)


def _is_running_text(answer: str, values: Values) -> bool:
    return not BULLET.search(answer) and not NUMBERED.search(answer)


_OPPOSITES: dict[str, Callable[[str, Values], bool]] = {
    "paragraphs": lambda answer, values: "\n" not in answer,
    "bullet_points": _is_running_text,
    "numbered_points": _is_running_text,
    "highlighted": lambda answer, values: "*" not in answer and "__" not in answer,
    "title": lambda answer, values: not any(map(HEADING.match, answer.splitlines())),
    "json": lambda answer, values: not re.search(r"[{}]|```", answer),
    "quoted": lambda answer, values: not {answer[:1], answer[-1:]} & set("\"'“”"),
    "postscript": lambda answer, values: not re.search(r"^\W*P\.?\s?S\b", answer, re.MULTILINE | re.IGNORECASE),
    "word_to_include": lambda answer, values: values["word"] not in split_words(answer),
    "lower_case": lambda answer, values: answer.lstrip("\"'“*#- ")[:1].isupper() and not answer.isupper(),
    "capitals": lambda answer, values: sum(map(str.islower, answer)) > sum(map(str.isupper, answer)),
    "no_commas": lambda answer, values: answer.count(",") >= 2,
    "no_exclamation_marks": lambda answer, values: answer.endswith("!"),
}
