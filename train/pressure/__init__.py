"""System messages under pressure: rules that a program checks, user turns that work against them, and verdicts."""
