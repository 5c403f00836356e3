"""HTTP connections to servers: address, key, TLS, redaction of secrets, streams, model lists."""
