"""TODO loop/guards."""
