"""Failures of requests: the exceptions, and counts of their messages by kind.

Messages that differ only in numbers and identifiers (`requested 4203 tokens`, `request 7f3a`) are one kind, shown with
its first message. The same results in the same order give the same counts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from train.llm.request import Answer

NO_ANSWER = "no answer from the model"
"""The reports' reason for rows dropped because of a `RequestFailed`."""
KINDS = 200
"""Kinds that are kept apart, to bound memory; further ones count as `other messages`."""
LONGEST_SHOWN = 200
SHOWN_IN_REPORT = 10
_OTHERS = "other messages"
_WITH_DIGITS = re.compile(r"\S*\d\S*")


class RequestFailed(Exception):  # noqa: N818
    """A request that will get no answer, while others do. The message is the server's.

    advice: the setting that the error is about, as a sentence.
    about_content: the error is about the length or the content of the request.
    """

    def __init__(self, message: str, advice: str | None = None, *, about_content: bool = False) -> None:
        super().__init__(message)
        self.advice = advice or ""
        self.about_content = about_content


class EmptyAnswerError(RequestFailed):
    """A request that got only empty answers; `answer` is the last of them.

    An answer of nothing but reasoning that has ended, or control tokens, is empty too.
    """

    def __init__(self, message: str, answer: Answer) -> None:
        super().__init__(message)
        self.answer = answer


class FailureReasons:
    """Counts of `RequestFailed` messages by kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._redact: dict[str, str] = {}

    def add(self, message: str) -> None:
        """Count a message."""
        status, _, rest = " ".join(message.split()).partition(" ")  # 400 and 500 are different kinds
        kind = f"{status} {_WITH_DIGITS.sub('#', rest)}"
        if kind not in self._redact and len(self._redact) >= KINDS:
            kind = _OTHERS
        self._counts[kind] += 1
        text = f"{status} {rest}".strip()
        text = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
        self._redact.setdefault(kind, _OTHERS if kind == _OTHERS else text)

    def counts(self) -> dict[str, int]:
        """Return the count of each kind, the most frequent first, equal ones in their order of arrival."""
        counts: Counter[str] = Counter()
        for kind, count in self._counts.items():
            counts[self._redact[kind]] += count
        return dict(counts.most_common())

    def lines(self, limit: int = 3) -> list[str]:
        """Return a line for each of the most frequent kinds (`12 times: 400 Bad Request: ...`), one for the rest."""
        counts = list(self.counts().items())
        lines = [f"{count:,} times: {message}" for message, count in counts[:limit]]
        if rest := counts[limit:]:
            lines.append(f"{sum(count for _, count in rest):,} times: something else ({len(rest):,} kinds)")
        return lines


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Return how often each kind of reason occurs, the most frequent first."""
    counts = FailureReasons()
    for reason in reasons:
        counts.add(reason or "no reason given")
    return counts.counts()


def shown_reasons(counts: Mapping[str, int]) -> str:
    """Return a single reason by itself, or the first three with their counts; without the full stop."""
    if len(counts) == 1:
        return next(iter(counts)).rstrip(".")
    return "; ".join(f"{count:,} times: {reason}" for reason, count in list(counts.items())[:3]).rstrip(".")


def to_table_cells(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the most frequent of `FailureReasons.counts`, quoted for a Markdown table."""
    return {f"`{message.replace('`', chr(39))}`": count for message, count in list(counts.items())[:SHOWN_IN_REPORT]}
