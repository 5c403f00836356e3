"""TODO preflight/plan."""
