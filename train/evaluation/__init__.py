"""Evaluations: how well a model follows system messages, benchmarks, and the comparison of two models."""
