"""Checkpoints: write, verify, find and resume."""
