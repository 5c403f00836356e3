"""Constraints: requirements on an answer that a program can check (at most 60 words, a list of four points, no commas).

- Some kinds are also IFEval's, but all wordings (constraints.yaml) are ours: training on a benchmark's own wording
  would make its score worthless. Each kind has several, so that a model learns the requirement and not a sentence.
- The wordings are English, for English answers.
- Checks are strict and simple, and fail an answer when in doubt: an answer that passes is trained on as an example of
  following the message.

Raise `train.sysgen.prompts.PROMPT_VERSION` with every change of `wordings`.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from train.datagen.opposites import has_opposite_form
from train.datagen.text_units import (
    BOLD,
    BULLET,
    HEADING,
    NUMBERED,
    count_sentences,
    has_paragraphs,
    is_json_object,
    split_words,
)

Check = Callable[[str], bool]

_WORDINGS = Path(__file__).with_name("constraints.yaml")


@dataclass(frozen=True, slots=True)
class Constraint:
    """One requirement, as text and as a check of an answer. The check takes any text and never raises."""

    kind: str
    tag: str
    text: str
    """Sentence of a system message."""
    is_met: Check
    opposites: tuple[str, ...]
    """Sentences of a user who asks for the opposite. An answer that does so breaks the constraint."""
    requests: tuple[str, ...]
    """Sentences of a user who asks for the same."""
    is_opposite: Check
    """Return whether an answer does what the opposites ask for."""


def draw_constraints(
    answers: Sequence[str], rng: random.Random, at_most: int, *, shaped: bool = False
) -> list[Constraint]:
    """Draw one to `at_most` compatible constraints for a conversation with these answers.

    Each constraint suits all of the answers, since every new answer must meet it. Answers that are not in Latin letters
    or are data (JSON, XML) get none.

    Args:
        answers: answers of the data.
        rng: random number generator.
        at_most: maximum number of constraints.
        shaped: the system message states the form of the answer ("a short paragraph"), so that no constraint may ask
            for another one (a JSON object).
    """
    originals = _OriginalAnswers(tuple(answers))
    if not originals.is_prose:
        return []
    count = rng.randint(1, at_most)
    kinds = list(_KINDS)
    rng.shuffle(kinds)
    drawn: list[Constraint] = []
    for kind in kinds:
        if len(drawn) == count:
            break
        if shaped and kind.name in _SHAPES:
            continue
        if kind.suits(originals) and not any(_exclude_each_other(kind.name, other.kind) for other in drawn):
            drawn.append(kind.draw(originals, rng))
    return drawn


# The original answers

_CODE = re.compile(
    r"""`|~~~|\\[a-zA-Z(\[]|\$[^$\n]*\$|[;{}]\s*$
    |^\s*(?:def\s|class\s\w+[:({]|import\s\w|\#include|function\s\w*\(|SELECT\s|(?:const|let|var)\s\w+\s?=)""",
    re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class _OriginalAnswers:
    """Answers of the data with the properties that decide which constraints suit them."""

    answers: tuple[str, ...]

    @cached_property
    def words(self) -> list[list[str]]:
        return [split_words(answer) for answer in self.answers]

    @cached_property
    def shortest(self) -> int:
        """Words of the shortest answer."""
        return min(map(len, self.words))

    @cached_property
    def longest(self) -> int:
        """Words of the longest answer."""
        return max(map(len, self.words))

    @cached_property
    def is_prose(self) -> bool:
        letters = [letter for answer in self.answers for letter in answer if letter.isalpha()]
        latin = sum(letter < "\u0250" or "\u1e00" <= letter <= "\u1eff" for letter in letters)
        return (
            bool(self.answers)
            and all(answer.strip() and not re.match(r"\s*[<{\[]", answer) for answer in self.answers)
            and latin >= 0.9 * len(letters)
        )

    def match(self, pattern: str) -> bool:
        """Return whether a regular expression matches in one of the answers."""
        return any(re.search(pattern, answer, re.MULTILINE) for answer in self.answers)

    @cached_property
    def has_code(self) -> bool:
        """Code or mathematics, where commas, capitals and punctuation have a meaning."""
        return any(map(_CODE.search, self.answers))

    @cached_property
    def has_list(self) -> bool:
        return self.match(BULLET.pattern) or self.match(NUMBERED.pattern) or self.match(r"^\s*\|.*\|")

    @cached_property
    def is_plain(self) -> bool:
        return not self.has_code and not self.has_list and not self.match(r"^#{1,6}\s")

    @cached_property
    def common_words(self) -> dict[str, int]:
        """Lower-case content words that occur in every answer, with their lowest count."""
        counts = [Counter(re.findall(r"(?<![\w'’-])[a-z]{5,14}(?![\w'’-])", answer)) for answer in self.answers]
        shared = set(counts[0]).intersection(*counts[1:]) - set(_NO_CONTENT.split())
        return {word: min(count[word] for count in counts) for word in sorted(shared)}


_NO_CONTENT = (
    "about above after again against almost along already although always among another around because become before "
    "being below between could doesn during either enough every first found further given having however instead "
    "itself might never often other others quite rather second shall should since still their there therefore these "
    "thing things third those though through together under until using where which while whose within without would "
    "yourself answer question sentence simply overall actually really basically important"
)
_AVOIDABLE = (
    "very", "really", "actually", "basically", "simply", "however", "therefore", "additionally", "overall", "important",
    "crucial", "essentially", "great", "certainly", "absolutely", "obviously", "definitely", "perhaps", "typically",
)  # fmt: skip
_BEGINNINGS = (
    "Here is my take:", "Let me walk you through it.", "In a nutshell:", "First things first:", "Short version first:",
    "Glad you brought this up.", "To put it plainly:", "This is how I see it:", "Happy to look into this.",
)  # fmt: skip
_ENDINGS = (
    "That covers it.", "Over to you.", "And there you have it.", "You can take it from here.", "Now you know.",
    "Good luck with it.", "That is the whole story.", "Write back if you get stuck.", "End of note.",
)  # fmt: skip


# The kinds

_Instance = tuple[dict[str, str], Check]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of constraint: the answers it suits, how its values are drawn, and its wordings."""

    name: str
    tag: str
    suits: Callable[[_OriginalAnswers], bool]
    instantiate: Callable[[_OriginalAnswers, random.Random], _Instance]

    def draw(self, originals: _OriginalAnswers, rng: random.Random) -> Constraint:
        values, check = self.instantiate(originals, rng)
        wordings, opposites, requests = (
            [text.format(**values) for text in _load_wordings()[self.name][use]]
            for use in ("wordings", "opposites", "requests")
        )
        text = rng.choice(wordings)
        return Constraint(
            self.name,
            self.tag,
            text,
            lambda answer: bool(answer.strip()) and check(answer),
            tuple(opposites),
            tuple(requests),
            lambda answer: bool(answer.strip()) and not check(answer) and has_opposite_form(self.name, values, answer),
        )


@functools.cache
def _load_wordings() -> dict[str, dict[str, list[str]]]:
    """Return the texts of each kind in constraints.yaml, with values in braces."""
    wordings: dict[str, dict[str, list[str]]] = yaml.safe_load(_WORDINGS.read_text(encoding="utf-8"))
    return wordings


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _number(number: int, rng: random.Random) -> dict[str, str]:
    """Return the value of a number, spelled out or in digits."""
    spelled = number < len(_NUMBERS) and rng.random() < 0.5
    return {"n": _NUMBERS[number] if spelled else str(number)}


def _step(number: float) -> int:
    """Return the step for rounding: people ask for round numbers."""
    return 5 if number < 60 else 10 if number < 200 else 50


def _words_at_most(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    about = originals.longest * rng.uniform(1.0, 1.4)
    limit = math.ceil(about / _step(about)) * _step(about)
    return {"n": str(limit)}, lambda answer: len(split_words(answer)) <= limit


def _words_at_least(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    about = originals.shortest * rng.uniform(0.6, 1.0)
    limit = math.floor(about / _step(about)) * _step(about)
    return {"n": str(limit)}, lambda answer: len(split_words(answer)) >= limit


def _sentences_at_most(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    limit = max(2, max(map(count_sentences, originals.answers)) + rng.randint(0, 1))
    return _number(limit, rng), lambda answer: count_sentences(answer) <= limit


def _paragraphs(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    count = min(2 + originals.shortest // 100, 5) if rng.random() < 0.5 else rng.randint(2, 3)
    return _number(count, rng), lambda answer: has_paragraphs(answer, count)


def _bullet_points(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    count = rng.randint(2, min(6, 2 + originals.shortest // 30))
    return _number(count, rng), lambda answer: len(BULLET.findall(answer)) == count


def _numbered_points(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    count = rng.randint(2, min(6, 2 + originals.shortest // 30))
    numbers = list(range(1, count + 1))
    return _number(count, rng), lambda answer: [int(number) for number in NUMBERED.findall(answer)] == numbers


def _highlighted(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    count = rng.randint(2, min(5, 2 + originals.shortest // 40))
    return _number(count, rng), lambda answer: len(BOLD.findall(answer)) >= count


def _beginning(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    phrase = rng.choice(_BEGINNINGS)
    return {"phrase": phrase}, lambda answer: answer.lstrip().startswith(phrase)


def _ending(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    phrase = rng.choice(_ENDINGS)
    return {"phrase": phrase}, lambda answer: answer.rstrip().endswith(phrase)


def _word_to_include(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    word, times = rng.choice(list(originals.common_words.items()))
    count = rng.randint(1, min(times, 3))
    often = {1: "at least once", 2: "at least twice", 3: "three or more times"}[count]
    return {"word": word, "often": often}, lambda answer: split_words(answer).count(word) >= count


def _word_to_avoid(originals: _OriginalAnswers, rng: random.Random) -> _Instance:
    used = [word for word in _AVOIDABLE if any(word in words for words in originals.words)]
    word = rng.choice(used if used and rng.random() < 0.5 else _AVOIDABLE)
    return {"word": word}, lambda answer: word not in re.split(r"[\W_]+", answer.casefold())


def _without(marks: str) -> Callable[[_OriginalAnswers, random.Random], _Instance]:
    return lambda originals, rng: ({}, lambda answer: not any(mark in answer for mark in marks))


def _that(check: Check) -> Callable[[_OriginalAnswers, random.Random], _Instance]:
    return lambda originals, rng: ({}, check)


def _is_quoted(answer: str) -> bool:
    answer = answer.strip()
    return len(answer) > 2 and answer[0] == answer[-1] == '"' and bool(answer[1:-1].strip())


def _ends_with_postscript(answer: str) -> bool:
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return len(lines) > 1 and lines[-1].startswith("PS:") and any(map(str.isalnum, lines[-1][3:]))


_KINDS = (
    _Kind("words_at_most", "Format", lambda it: it.longest >= 10 and not it.has_code, _words_at_most),
    _Kind("words_at_least", "Format", lambda it: 30 <= it.shortest <= 400 and not it.has_code, _words_at_least),
    _Kind("sentences_at_most", "Format", lambda it: it.is_plain and it.longest <= 120, _sentences_at_most),
    _Kind("paragraphs", "Format", lambda it: it.is_plain and it.shortest >= 60, _paragraphs),
    _Kind("bullet_points", "Format", lambda it: it.shortest >= 30 and not it.has_code, _bullet_points),
    _Kind("numbered_points", "Format", lambda it: it.shortest >= 30 and not it.has_code, _numbered_points),
    _Kind("highlighted", "Format", lambda it: it.shortest >= 30 and not it.has_code, _highlighted),
    _Kind("title", "Format", lambda it: it.shortest >= 40, _that(lambda answer: bool(HEADING.match(answer.strip())))),
    _Kind("json", "Format", lambda it: it.is_plain and it.longest <= 60, _that(is_json_object)),
    _Kind(
        "quoted", "Format", lambda it: it.is_plain and it.longest <= 100 and not it.match('["“”]'), _that(_is_quoted)
    ),
    _Kind("postscript", "Content", lambda it: it.shortest >= 20, _that(_ends_with_postscript)),
    _Kind("beginning", "Content", lambda it: it.shortest >= 10, _beginning),
    _Kind("ending", "Content", lambda it: it.shortest >= 10, _ending),
    _Kind(
        "word_to_include",
        "Content",
        lambda it: it.shortest >= 20 and not it.has_code and bool(it.common_words),
        _word_to_include,
    ),
    _Kind("word_to_avoid", "Style", lambda it: it.shortest >= 20, _word_to_avoid),
    _Kind(
        "lower_case",
        "Style",
        lambda it: not it.has_code and not it.match(r"\d,\d"),
        _that(lambda answer: not any(letter.isupper() or letter.istitle() for letter in answer)),
    ),
    _Kind(
        "capitals",
        "Style",
        lambda it: it.longest <= 40 and not it.has_code,
        _that(lambda answer: not any(letter.islower() for letter in answer)),
    ),
    _Kind("no_commas", "Style", lambda it: not it.has_code and not it.match(r"\d,\d"), _without(",，、،")),
    _Kind("no_exclamation_marks", "Style", lambda it: not it.has_code and not it.match(r"\d!|!="), _without("!！¡")),
)

_EXCLUDING = (
    ("words_at_most words_at_least sentences_at_most", "words_at_most words_at_least sentences_at_most"),
    ("paragraphs bullet_points numbered_points sentences_at_most quoted",) * 2,
    ("paragraphs sentences_at_most", "title postscript"),  # they add a line
    ("sentences_at_most", "beginning ending"),
    ("lower_case", "capitals"),
    ("lower_case capitals", "beginning ending postscript"),  # their words are in both cases
    ("beginning title quoted", "beginning title quoted"),
    ("ending postscript quoted", "ending postscript quoted"),
    ("word_to_include", "word_to_avoid"),
    (
        "json",
        "paragraphs bullet_points numbered_points sentences_at_most words_at_least quoted highlighted title beginning "
        "ending postscript lower_case capitals no_commas",
    ),
)
"""Kinds of which one of the first and one of the second can't both be met, or only awkwardly."""

_SHAPES = frozenset(("paragraphs", "bullet_points", "numbered_points", "title", "json", "quoted"))
"""Kinds that prescribe the form of the complete answer."""

_PAIRS = {frozenset((a, b)) for first, second in _EXCLUDING for a in first.split() for b in second.split()}


def _exclude_each_other(kind: str, other: str) -> bool:
    return kind == other or frozenset((kind, other)) in _PAIRS
