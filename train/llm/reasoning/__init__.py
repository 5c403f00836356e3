"""Reasoning in replies: separate what a model thought from its answer."""

from train.llm.reasoning.answer import advice_on, events_of, read_answer, without_reasoning

__all__ = ["advice_on", "events_of", "read_answer", "without_reasoning"]
