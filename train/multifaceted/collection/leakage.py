"""Leakage of an instruction into its system message, which must fit any instruction."""

from train.datagen.content_words import extract_content_words

FEWEST = 3
"""Shared content words below which a message leaks nothing."""


def measure_instruction_leak(message: str, instruction: str) -> float:
    """Return the share of the instruction's content words that the message holds, 0 to 1; 0 below three words."""
    content_words = extract_content_words(instruction)
    shared = content_words & extract_content_words(message)
    return len(shared) / len(content_words) if len(shared) >= FEWEST else 0.0
