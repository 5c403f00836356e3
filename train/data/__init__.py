"""Data: rows -> conversations -> tokens -> packed sequences."""
