"""Rows -> conversations -> tokens -> packed rows."""
