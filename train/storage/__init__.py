"""Storage: atomic writes, file locks, checksums, JSON lines and local paths."""
