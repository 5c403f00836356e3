"""Endings of answers: the words by which reports count how the model under evaluation stopped, and missing answers."""

import re
from collections.abc import Sequence

from train.formatting import format_count
from train.llm.failures import RequestFailed
from train.llm.request import Answer

NO_ANSWER = "no answer"


def describe_ending(answer: Answer | RequestFailed) -> str:
    """Return `ended`, `cut`, `empty`, `refused`, `no answer` or another ending of an answer."""
    if not isinstance(answer, Answer):
        return NO_ANSWER
    if answer.cut:
        return "without an end to its reasoning" if answer.only_reasoning else "cut"
    if answer.finish_class == "unstated" and not answer.refused and not answer.text.strip():
        return "empty"
    return answer.unfinished or "ended"


def summarize_unanswered(noun: str, verb: str, failures: Sequence[tuple[str, str]], not_asked: int = 0) -> str:
    """Return `2 rows got no answer and count as not held; the first (key): reason`; empty if all got one.

    Args:
        noun: what was asked, such as `row`.
        verb: what is made of it, in the plural: `fail`, `count as not held`.
        failures: place and reason of each request that failed, in order.
        not_asked: number of those that were not asked as an earlier one had failed.
    """
    if not failures:
        return ""
    place, reason = failures[0]
    verb_of_one = re.sub(r"^\w+", r"\g<0>s", verb)
    after = f" ({not_asked:,} of them come after such a {noun})" if not_asked else ""
    verbs = f"got no answer and {verb_of_one}", f"got no answer and {verb}"
    missing = format_count(len(failures) + not_asked, noun, *verbs)
    return f"{missing}{after}; the first{f' ({place})' if place else ''}: {' '.join(reason.split())[:500]}"
