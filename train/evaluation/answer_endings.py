"""Endings of answers: the words by which reports count how the model under evaluation stopped."""

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
