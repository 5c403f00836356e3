"""TODO model/attention."""
