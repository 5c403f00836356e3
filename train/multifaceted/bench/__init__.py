"""Multifaceted Bench: rows with rubrics, a judge that grades each response, scores with intervals, pairwise wins."""
