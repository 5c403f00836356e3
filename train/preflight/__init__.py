"""Preflight: the report of `--check`, the start screen, the plan of memory and time, and the recipe to start from."""
