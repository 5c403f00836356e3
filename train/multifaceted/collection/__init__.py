"""TODO multifaceted/collection."""
