"""TODO evaluation/ifeval."""
