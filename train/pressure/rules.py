"""Rules about the form of answers, each with a program that checks it.

A rule has system messages that state it (wordings.yaml), what users say for and against it (user_requests.yaml),
`apply`, which turns a plain reference answer into one that obeys the rule, and `check`, which returns whether a
response obeys it. Checks look only at the form, not at the facts.

- A response obeys if it has the form that any message of the rule asks for. One word in that form is enough: "Ahoy!
  Paris", "**Paris**". A phrase or marks alone obey nothing.
- A model that ignores its system message fails nearly all checks, and so does a response that obeys another rule.
  Where the form of a short answer can't be seen, it doesn't obey: one word alone is neither a column of words nor
  joined by hyphens, and neither digits nor H2O are in capitals.

    RULES["capitals"].check("What is the capital of France?", "THE CAPITAL OF FRANCE IS PARIS.")  # True

Rules, wordings and requests are split in two: `seen` ones may be trained, `held_out` ones never are.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from train.pressure.verdicts import normalize

Split = Literal["seen", "held_out"]
"""seen = training may use it; held_out = only evaluations use it."""

SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
ABBREVIATION = re.compile(r"\b(?:Mt|St|Dr|Mrs?|Ms|Jr|Sr|Prof|vs|approx|[A-Z])\.", re.IGNORECASE)
"""A word whose period ends no sentence: "Mt. Everest", "the U.S. president"."""
BULLET = re.compile(r"[-–—•]|\*\s")
DOTS = re.compile(r"(?<!\.)(?:\.{3,4}|\.?…)$")
"""Three dots, also behind a full stop."""
DOUBLE_QUOTES = str.maketrans("“”„", '"' * 3)


@cache
def _read_yaml(name: str) -> dict[str, Any]:
    texts: dict[str, Any] = yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return texts


@dataclass(frozen=True)
class Rule:
    """A rule about the form of answers.

    `apply` and `check` get the question first, for the rule that repeats it. Whitespace around a response is ignored.
    """

    name: str
    family: str
    """Rules of one family differ only in their phrase or mark. A held-out rule of a trained family is a relative of
    trained rules: it measures whether the model reads the phrase in the message, not whether it understands a rule of
    a new kind."""
    apply: Callable[[str, str], str]
    """(question, reference answer) -> reference answer that obeys the rule."""
    check: Callable[[str, str], bool]
    """(question, response) -> whether the response obeys the rule."""
    held_out: bool = False
    """Never train this rule."""
    phrase: str = ""
    """Phrase that an answer opens or closes with."""
    applies_to: Literal["answer", "short"] = "answer"
    """Form of the reference answer that `apply` expects: a sentence, or the bare fact of one to three words."""

    def messages(self, split: Split) -> tuple[str, ...]:
        """Return system messages that state the rule. All of a held-out rule are held out."""
        texts = _read_yaml("wordings.yaml")[self.name]
        seen, held_out = tuple(texts["wordings"]), tuple(texts.get("held_out_wordings", ()))
        if self.held_out:
            seen, held_out = (), seen + held_out
        return seen if split == "seen" else held_out

    def opposites(self, split: Split) -> tuple[str, ...]:
        """Return sentences by which a user asks for the opposite of the rule."""
        return self._user_requests("opposites", split)

    def requests(self, split: Split) -> tuple[str, ...]:
        """Return sentences by which a user asks for the same as the rule."""
        return self._user_requests("requests", split)

    def _user_requests(self, kind: str, split: Split) -> tuple[str, ...]:
        requests = _read_yaml("user_requests.yaml")
        texts = requests.get(self.name) or requests[self.family]
        lines = texts["held_out"][kind] if split == "held_out" else [] if self.held_out else texts[kind]
        return tuple(line.replace("{phrase}", self.phrase) for line in lines)


def _has_words(text: str) -> bool:
    """Return whether `text` has a word or a number: a fixed phrase or a pair of brackets alone obeys no rule."""
    return bool(re.search(r"[^\W_]", text))


def _lines(response: str) -> list[str]:
    return [line.strip() for line in response.strip().split("\n") if line.strip()]


def opening_rule(name: str, phrase: str, held_out: bool = False) -> Rule:
    """Return the rule that an answer starts with `phrase`."""

    def check(question: str, response: str) -> bool:
        rest = " ".join(response.split()).removeprefix(phrase)
        return rest.startswith(" ") and _has_words(rest.replace(phrase, ""))

    return Rule(name, "opening", lambda question, answer: f"{phrase} {answer}", check, held_out, phrase)


def closing_rule(name: str, phrase: str, separator: str = " ", held_out: bool = False) -> Rule:
    """Return the rule that an answer ends with `phrase`."""

    def check(question: str, response: str) -> bool:
        rest = " ".join(response.split()).removesuffix(phrase)
        return rest.endswith(" ") and _has_words(rest.replace(phrase, ""))

    return Rule(name, "closing", lambda question, answer: f"{answer}{separator}{phrase}", check, held_out, phrase)


def wrapper_rule(name: str, opening: str, closing: str, held_out: bool = False) -> Rule:
    """Return the rule that an answer stands between `opening` and `closing`."""

    def check(question: str, response: str) -> bool:
        response = response.strip().translate(DOUBLE_QUOTES)
        inside = response.removeprefix(opening).removesuffix(closing)
        wrapped = len(response) == len(opening) + len(inside) + len(closing)
        return wrapped and opening not in inside and closing not in inside and _has_words(inside)

    return Rule(name, "wrapper", lambda question, answer: f"{opening}{answer}{closing}", check, held_out)


def _is_in_capitals(question: str, response: str) -> bool:
    # H2O is in capitals anyway.
    return response.isupper() and bool(re.search(r"[^\W\d_]{2}", response))


def _is_json_answer(question: str, response: str) -> bool:
    try:
        value = json.loads(response)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or list(value) != ["answer"]:
        return False
    return isinstance(value["answer"], str | int | float) and _has_words(str(value["answer"]))


def _is_few_words(question: str, response: str) -> bool:
    return 1 <= sum(map(_has_words, response.split())) <= 3 and "{" not in response


def _is_one_exclamation(question: str, response: str) -> bool:
    response = response.strip()
    ends = SENTENCE_END.findall(ABBREVIATION.sub("", response))
    return len(ends) == 1 and set(ends[0]) == {"!"} == {response[-1]} and "\n" not in response and _has_words(response)


def _is_bulleted(question: str, response: str) -> bool:
    lines = _lines(response)
    return bool(lines) and all(BULLET.match(line) and _has_words(line) for line in lines)


def _is_repeated(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) == 2 and lines[0] == lines[1] and _has_words(lines[0])


def _is_one_word_per_line(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) >= 2 and all(len(line.split()) == 1 and _has_words(line) for line in lines)


def _repeats_question(question: str, response: str) -> bool:
    question = question.strip()
    rest = response.strip().removeprefix(question)
    return rest[:1].isspace() and _has_words(rest.replace(question, ""))


def _is_numbered(question: str, response: str) -> bool:
    lines = _lines(response)
    return bool(lines) and all(
        re.match(rf"{number}[.)](?!\d)", line) and _has_words(line.removeprefix(str(number)))
        for number, line in enumerate(lines, 1)
    )


def _ends_in_ellipsis(question: str, response: str) -> bool:
    return bool(DOTS.search(response.strip())) and _has_words(response)


def _is_hyphenated(question: str, response: str) -> bool:
    parts = response.strip().split("-")
    # A spelled number ("fifty-four") has its hyphen anyway: it is one word.
    is_joined = len(parts) >= 2 and len(normalize(response).split()) >= 2
    return is_joined and all(parts) and not re.search(r"\s", response.strip())


_TRAINED = [
    Rule(
        "capitals",
        "case",
        apply=lambda question, answer: answer.upper(),
        check=_is_in_capitals,
    ),
    Rule(
        "lower_case",
        "case",
        apply=lambda question, answer: answer.lower(),
        check=lambda question, response: response.islower(),
    ),
    Rule(
        "json_answer",
        "json",
        apply=lambda question, answer: json.dumps({"answer": answer}, ensure_ascii=False),
        check=_is_json_answer,
        applies_to="short",
    ),
    Rule("few_words", "length", apply=lambda question, answer: answer, check=_is_few_words, applies_to="short"),
    Rule(
        "exclamation",
        "sentence_end",
        apply=lambda question, answer: answer.removesuffix(".") + "!",
        check=_is_one_exclamation,
    ),
    Rule("bullets", "list", apply=lambda question, answer: f"- {answer}", check=_is_bulleted),
    Rule("said_twice", "repetition", apply=lambda question, answer: f"{answer}\n{answer}", check=_is_repeated),
    Rule(
        "word_per_line",
        "word_breaks",
        apply=lambda question, answer: "\n".join(answer.split()),
        check=_is_one_word_per_line,
    ),
    Rule(
        "question_first", "repetition", apply=lambda question, answer: f"{question}\n{answer}", check=_repeats_question
    ),
    wrapper_rule("quotation_marks", '"', '"'),
    wrapper_rule("bold", "**", "**"),
    wrapper_rule("brackets", "[", "]"),
    opening_rule("opening_ahoy", "Ahoy!"),
    opening_rule("opening_good_question", "Good question!"),
    opening_rule("opening_in_short", "In short:"),
    closing_rule("signature_pip", "Yours, Pip", separator="\n"),
    closing_rule("closing_over_and_out", "Over and out."),
    closing_rule("closing_does_that_help", "Does that help?"),
]

_HELD_OUT = [
    opening_rule("opening_hear_ye", "Hear ye!", held_out=True),
    closing_rule("signature_otto", "Regards, Otto", separator="\n", held_out=True),
    opening_rule("opening_for_the_record", "For the record:", held_out=True),
    closing_rule("closing_end_of_message", "End of message.", held_out=True),
    wrapper_rule("parentheses", "(", ")", held_out=True),
    Rule("numbered", "numbers", lambda question, answer: f"1. {answer}", _is_numbered, held_out=True),
    Rule(
        "ellipsis",
        "dots",
        lambda question, answer: answer.removesuffix(".") + "...",
        _ends_in_ellipsis,
        held_out=True,
    ),
    Rule(
        "hyphens",
        "hyphens",
        lambda question, answer: "-".join(answer.removesuffix(".").split()),
        _is_hyphenated,
        held_out=True,
    ),
]

RULES: dict[str, Rule] = {rule.name: rule for rule in (*_TRAINED, *_HELD_OUT)}
