"""Samples: answers that a run generates at each evaluation, judged by programs."""
