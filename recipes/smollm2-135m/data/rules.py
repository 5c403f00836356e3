"""Rules that the quickstart's system messages state, each with a program that checks it.

A rule has system messages that state it (wordings.yaml; some are never trained), `apply`, which turns a plain
reference answer into one that obeys the rule, and `check`, which returns whether a response obeys it. Checks are
strict: a model that ignores its system message fails nearly all of them, and so does a response that obeys another
rule. They look only at the form, not at the facts.

The folder is not a package; load the rules by path:

    spec = importlib.util.spec_from_file_location("rules", "recipes/smollm2-135m/data/rules.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    rules.RULES["capitals"].check("What is the capital of France?", "THE CAPITAL OF FRANCE IS PARIS.")  # True
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
PLAIN_WORD = re.compile(r"[\w$][\w%'’,.°-]*")
_WORDINGS = yaml.safe_load((Path(__file__).parent / "wordings.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Rule:
    """A rule about the form of answers.

    `apply` and `check` get the question first, for the rule that repeats it. Whitespace around a response is ignored.
    """

    name: str
    apply: Callable[[str, str], str]
    """(question, reference answer) -> reference answer that obeys the rule."""
    check: Callable[[str, str], bool]
    """(question, response) -> whether the response obeys the rule."""
    held_out: bool = False
    """Never train this rule."""
    applies_to: Literal["answer", "short"] = "answer"
    """Form of the reference answer that `apply` expects: a sentence, or the bare fact of one to three words."""

    @property
    def wordings(self) -> tuple[str, ...]:
        """System messages that state the rule; they are trained unless `held_out` is set."""
        return tuple(_WORDINGS[self.name]["wordings"])

    @property
    def held_out_wordings(self) -> tuple[str, ...]:
        """System messages that are never trained although the rule is."""
        return tuple(_WORDINGS[self.name].get("held_out_wordings", ()))


def _has_words(text: str, at_least: int = 2) -> bool:
    """Return whether `text` has words: a fixed phrase or a pair of brackets alone obeys no rule."""
    return len(re.findall(r"\w+", text)) >= at_least


def _lines(response: str) -> list[str]:
    return [line.strip() for line in response.strip().split("\n") if line.strip()]


def _opening(name: str, phrase: str, held_out: bool = False) -> Rule:
    """Return the rule that an answer starts with `phrase`."""

    def check(question: str, response: str) -> bool:
        response = response.strip()
        rest = response.removeprefix(phrase)
        return rest != response and rest[:1].isspace() and _has_words(rest)

    return Rule(name, lambda question, answer: f"{phrase} {answer}", check, held_out)


def _closing(name: str, phrase: str, separator: str = " ", held_out: bool = False) -> Rule:
    """Return the rule that an answer ends with `phrase`."""

    def check(question: str, response: str) -> bool:
        response = response.strip()
        rest = response.removesuffix(phrase)
        return rest != response and rest[-1:].isspace() and _has_words(rest)

    return Rule(name, lambda question, answer: f"{answer}{separator}{phrase}", check, held_out)


def _wrapper(name: str, opening: str, closing: str) -> Rule:
    """Return the rule that an answer stands between `opening` and `closing`."""

    def check(question: str, response: str) -> bool:
        response = response.strip()
        inside = response.removeprefix(opening).removesuffix(closing)
        wrapped = len(response) == len(opening) + len(inside) + len(closing)
        return wrapped and opening not in inside and closing not in inside and _has_words(inside)

    return Rule(name, lambda question, answer: f"{opening}{answer}{closing}", check)


def _is_json_answer(question: str, response: str) -> bool:
    try:
        value = json.loads(response)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"] and bool(str(value["answer"]).strip())


def _is_few_words(question: str, response: str) -> bool:
    words = response.split()
    return 1 <= len(words) <= 3 and all(PLAIN_WORD.fullmatch(word) for word in words)


def _is_one_exclamation(question: str, response: str) -> bool:
    response = response.strip()
    ends = SENTENCE_END.findall(response)
    return ends == ["!"] and response.endswith("!") and "\n" not in response and _has_words(response)


def _is_bulleted(question: str, response: str) -> bool:
    return bool(_lines(response)) and all(re.match(r"- \S", line) for line in _lines(response))


def _is_repeated(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) == 2 and lines[0] == lines[1] and _has_words(lines[0])


def _is_one_word_per_line(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) >= 3 and all(len(line.split()) == 1 for line in lines)


def _repeats_question(question: str, response: str) -> bool:
    lines = _lines(response)
    return len(lines) >= 2 and lines[0] == question.strip() and _has_words(" ".join(lines[1:]))


_TRAINED = [
    Rule(
        "capitals",
        apply=lambda question, answer: answer.upper(),
        check=lambda question, response: response.isupper() and _has_words(response),
    ),
    Rule(
        "lower_case",
        apply=lambda question, answer: answer.lower(),
        check=lambda question, response: response.islower() and _has_words(response),
    ),
    Rule(
        "json_answer",
        apply=lambda question, answer: json.dumps({"answer": answer}, ensure_ascii=False),
        check=_is_json_answer,
        applies_to="short",
    ),
    Rule("few_words", apply=lambda question, answer: answer, check=_is_few_words, applies_to="short"),
    Rule("exclamation", apply=lambda question, answer: answer.removesuffix(".") + "!", check=_is_one_exclamation),
    Rule("bullets", apply=lambda question, answer: f"- {answer}", check=_is_bulleted),
    Rule("said_twice", apply=lambda question, answer: f"{answer}\n{answer}", check=_is_repeated),
    Rule("word_per_line", apply=lambda question, answer: "\n".join(answer.split()), check=_is_one_word_per_line),
    Rule("question_first", apply=lambda question, answer: f"{question}\n{answer}", check=_repeats_question),
    _wrapper("quotation_marks", '"', '"'),
    _wrapper("bold", "**", "**"),
    _wrapper("brackets", "[", "]"),
    _opening("opening_ahoy", "Ahoy!"),
    _opening("opening_good_question", "Good question!"),
    _opening("opening_in_short", "In short:"),
    _closing("signature_pip", "Yours, Pip", separator="\n"),
    _closing("closing_over_and_out", "Over and out."),
    _closing("closing_does_that_help", "Does that help?"),
]

# Both are relatives of trained rules, with mostly trained wordings and another phrase. They measure whether the model
# reads the phrase in the system message, not whether it understands a new kind of rule.
_HELD_OUT = [
    _opening("opening_hear_ye", "Hear ye!", held_out=True),
    _closing("signature_otto", "Regards, Otto", separator="\n", held_out=True),
]

RULES: dict[str, Rule] = {rule.name: rule for rule in (*_TRAINED, *_HELD_OUT)}
