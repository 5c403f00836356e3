"""TODO system_gain."""
