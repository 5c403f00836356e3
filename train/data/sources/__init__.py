"""TODO data/sources."""
