"""The warning of a run in which most replies held no verdict that could be read."""
