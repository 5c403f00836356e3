"""Why requests got no answer, in the server's words, counted by kind.

Words that differ in their numbers and identifiers alone (`requested 4203 tokens`, `request 7f3a`) are one kind, shown
as it came first. So the same outcomes in the same order give the same counts.
"""

import re
from collections import Counter
from collections.abc import Mapping

from train.llm.journal import Answer

NO_ANSWER = "no answer from the model"
"""The reason that reports give of what is left out by a `RequestFailed`."""
KINDS = 200
"""So many kinds are told apart, so that memory stays flat; what is new beyond them counts as `other words`."""
LONGEST_SHOWN = 200
SHOWN_IN_REPORT = 10
_OTHERS = "other words"
_WITH_DIGITS = re.compile(r"\S*\d\S*")


class RequestFailed(Exception):  # noqa: N818
    """This request gets no answer, whatever is done; others do. The message says what the server said.

    `advice`: the setting that the server's error is about, as a sentence.
    """

    def __init__(self, what: str, advice: str | None = None, *, about_content: bool = False) -> None:
        super().__init__(what)
        self.advice = advice or ""
        self.about_content = about_content


class EmptyAnswerError(RequestFailed):
    """The model says nothing to this request, try after try. `answer`: the last of the empty ones.

    One that holds nothing but reasoning that has ended, or control tokens, is empty too.
    """

    def __init__(self, words: str, answer: Answer) -> None:
        super().__init__(words)
        self.answer = answer


class FailureReasons:
    """Counts what `RequestFailed` says."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._shown: dict[str, str] = {}

    def add(self, words: str) -> None:
        """One more was left without an answer, for this reason."""
        status, _, rest = " ".join(words.split()).partition(" ")  # 400 and 500 are never one kind
        kind = f"{status} {_WITH_DIGITS.sub('#', rest)}"
        if kind not in self._shown and len(self._shown) >= KINDS:
            kind = _OTHERS
        self._counts[kind] += 1
        self._shown.setdefault(kind, _OTHERS if kind == _OTHERS else _beginning(f"{status} {rest}".strip()))

    def counts(self) -> dict[str, int]:
        """How often each kind came, the most frequent first, those that are equal in the order they came in."""
        found: Counter[str] = Counter()
        for kind, count in self._counts.items():
            found[self._shown[kind]] += count
        return dict(found.most_common())

    def lines(self, most: int = 3) -> list[str]:
        """The most frequent kinds, one line each (`12 times: 400 Bad Request: ...`), and one for all the others."""
        counts = list(self.counts().items())
        lines = [f"{count:,} times: {words}" for words, count in counts[:most]]
        if rest := counts[most:]:
            lines.append(f"{sum(count for _, count in rest):,} times: something else ({len(rest):,} kinds)")
        return lines


def to_table_cells(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent of `FailureReasons.counts`, as cells of a table that take them for nothing but text."""
    return {f"`{words.replace('`', chr(39))}`": count for words, count in list(counts.items())[:SHOWN_IN_REPORT]}


def _beginning(words: str) -> str:
    return words if len(words) <= LONGEST_SHOWN else f"{words[:LONGEST_SHOWN]}..."
