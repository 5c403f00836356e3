"""Ends of answers, as evaluations count them."""

from train.llm.failures import RequestFailed
from train.llm.request import Answer


def describe_ending(answer: Answer | RequestFailed) -> str:
    """Return how an answer ended: `ended`, `cut`, `empty`, `refused`, `no answer`, ..."""
    if isinstance(answer, RequestFailed):
        return "no answer"
    if answer.cut:
        return "without an end to its reasoning" if answer.only_reasoning else "cut"
    if answer.finish_class == "unstated" and not answer.refused and not answer.text.strip():
        return "empty"
    return answer.unfinished or "ended"
