"""TODO data/tokens."""
