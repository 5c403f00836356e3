"""JANUS's data and benchmark: preference sets over four dimensions, system messages from them, and a judge."""
