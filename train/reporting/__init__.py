"""Reporting: Markdown, plots and the conditions of measurements."""
