"""TODO loop/checkpoint."""
