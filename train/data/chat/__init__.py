"""Chat templates: rendering, assistant spans, system roles, control tokens."""
