"""Tokens: parallel tokenization, the token table on disk, the cache entry of a source."""
