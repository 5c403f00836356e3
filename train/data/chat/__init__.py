"""TODO data/chat."""
