"""Vocabulary of the tiny model of the tests: words that are one token each."""

WORDS = "river stone cloud amber seven quiet window paper north candle orbit maple silver engine harbor"
