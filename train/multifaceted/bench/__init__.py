"""TODO multifaceted/bench."""
