"""Reasoning in replies, separated from the answer: `read_answer` for an Answer, `without_reasoning` for a text."""

from train.llm.reasoning.answer import (
    LEFTOVER_EVENTS,
    ParsedReply,
    format_advice,
    list_events,
    read_answer,
    without_reasoning,
)
from train.llm.reasoning.control_tokens import strip_end_tokens

__all__ = [
    "LEFTOVER_EVENTS",
    "ParsedReply",
    "format_advice",
    "list_events",
    "read_answer",
    "strip_end_tokens",
    "without_reasoning",
]
