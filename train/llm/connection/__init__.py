"""TODO llm/connection."""
