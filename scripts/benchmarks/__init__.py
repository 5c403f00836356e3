"""Benchmarks: one file per benchmark and contender."""
