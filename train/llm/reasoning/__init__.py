"""Reasoning in replies, separated from the answer."""

from train.llm.reasoning.answer import format_advice, list_events, read_answer, without_reasoning

__all__ = ["format_advice", "list_events", "read_answer", "without_reasoning"]
