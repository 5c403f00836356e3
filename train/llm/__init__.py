"""Asking models: any OpenAI-compatible server, many requests at a time, nothing asked twice."""
