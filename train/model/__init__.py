"""Models and tokenizers: checking, loading, adapters, merging, inference, and counts of their parameters and FLOPs."""
