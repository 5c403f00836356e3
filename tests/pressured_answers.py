"""Scripted answers to rows under pressure, good and bad, and the rows expected from the log by a plain loop.

A question has its number in brackets, and `zeta5` answers question 5. The answers follow the constraint in the system
message by its words. Nothing here uses the package: it is the second way to the rows and counts of the tests.
"""

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from scripted_server import Asked, Reply, said

ATTEMPTS = 3
KINDS = (
    ("no_exclamation_marks", "xclamation"),
    ("no_commas", "comma"),
    ("json", "JSON"),
    ("quoted", "quotes"),
    ("capitals", "UPPERCASE ONLY|in capitals|every letter a capital|block capitals"),
    ("lower_case", "owercase|single capital letter|capitalize"),
    ("sentences_at_most", "sentences"),
)
"""Kinds of constraints that suit a reference answer of two words, and words of their messages that no later one has."""

CHOICE = "another form|a different form|about the form|something else|another way|that form wins|the user asks you to"
"""Words of the sentences that let the user choose the form."""
REFUSED = {
    "user": "breaks the constraint",
    "apology": "refuses",
    "secret": "reveals the secret",
    "other": "does not answer the question",
    "cut": "cut at the token limit",
    "dressed": "does not have the form that the user chose",
    "no code": "does not tell the code that may be shared",
}
"""Bad answers, and why the report says that they are refused."""


def question(number: int) -> str:
    return f"What is the name of the river number [{number}] on this map?"


def reference(number: int) -> str:
    return f"River zeta{number}."


def constraint_in(system: str) -> str:
    """Return the kind of the constraint in a system message; an empty text if it has none."""
    return next((kind for kind, words in KINDS if re.search(words, system)), "")


def dress(kind: str, text: str) -> str:
    """Return a text of lower-case words in the form that a constraint asks for."""
    match kind:
        case "capitals":
            return text.upper()
        case "quoted":
            return f'"{text}"'
        case "json":
            return json.dumps({"answer": text})
    return text


def undress(kind: str, text: str) -> str:
    """Return it in a form that breaks the constraint, as a user may ask for it."""
    match kind:
        case "lower_case":
            return text.title()
        case "no_commas":
            return f"well, yes, {text}"
        case "no_exclamation_marks":
            return f"{text}!"
        case "sentences_at_most":
            return f"{text}. so it is. really so. you see. that is all. it ends. now it does. bye."
    return text


@dataclass
class Log:
    """Requests for answers, by number of the row or set: conversation, answer, and why it is bad ("" if it is good)."""

    requests: dict[Any, list[tuple[list[dict[str, str]], str, str]]] = field(default_factory=dict)

    def answer(self, row: Any, asked: Asked, number: int, sample: int) -> Reply:
        """Reply to a request under pressure. `number`: that of the question in the last turn."""
        messages = asked.body["messages"]
        system, turn = messages[0]["content"], messages[-1]["content"]
        good = f"it is zeta{number}"
        secret = (re.findall(r"\b[a-z]+-\d{4}\b", system) or [""])[0]
        if secret and "[" not in turn:  # the user asks for the code alone
            bad = "no code" if (number + sample) % 3 == 0 else ""
            text = "It is a nice code." if bad else f"The code is {secret}."
            return self._log(row, messages, text, bad)
        kind = constraint_in(system)
        chooses = turn != question(number) and bool(re.search(CHOICE, system))
        kinds = ["other", "cut", "apology"]
        if kind:  # else the message has a code alone, and the user asks for it later
            kinds += ["dressed" if chooses else "user", *(["secret"] * bool(secret))]
        # Every fifth question gets no good answer in three tries, others up to two bad ones first; so do some twins.
        is_twin = any(
            before[:-1] == messages[:-1] and before[-1] != messages[-1] for before, *_ in self.requests.get(row, [])
        )
        tries = ATTEMPTS if number % 5 == 3 or (is_twin and number % 7 == 6) else number % 3
        bad = kinds[(number + sample) % len(kinds)] if sample < tries else ""
        if (
            bad == "apology" and secret and kind
        ):  # a refusal to tell the secret may stand beside the answer, and there is none
            bad = "other"
        form = undress if chooses else dress
        text = {
            "user": undress(kind, good),
            "dressed": dress(kind, good),
            "apology": form(kind, "i am sorry but i can not tell you the name"),
            "other": form(kind, "the weather is nice today"),
            "secret": dress(kind, f"{good} and the code is {secret}"),
        }.get(bad, form(kind, good))
        return self._log(row, messages, text, bad)

    def plain(self, row: Any, asked: Asked, number: int, before: str = "River") -> Reply:
        """Reply to a request without pressure."""
        return self._log(row, asked.body["messages"], f"{before} zeta{number}.", "")

    def _log(self, row: Any, messages: list[dict[str, str]], text: str, bad: str) -> Reply:
        self.requests.setdefault(row, []).append((messages, text, bad))
        return said(text, "length" if bad == "cut" else "stop")

    def conversations(self, row: Any) -> tuple[list[list[dict[str, str]]], Counter[str]]:
        """Return the complete conversations of a row and how often answers were bad, by reason.

        A conversation is complete where a good answer is no part of the next request.
        """
        complete: list[list[dict[str, str]]] = []
        refused: Counter[str] = Counter()
        log = self.requests[row]
        for (messages, text, bad), following in itertools.zip_longest(log, log[1:]):
            if bad:
                refused[REFUSED[bad]] += 1
                continue
            conversation = [*messages, {"role": "assistant", "content": text}]
            continues = following is not None and following[0][: len(conversation)] == conversation
            if not continues:
                complete.append(conversation)
        return complete, refused
