"""TODO evaluation/models."""
