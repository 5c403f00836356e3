"""Measure what a model does with system messages, and compare two."""
