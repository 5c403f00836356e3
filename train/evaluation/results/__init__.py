"""Results of scripts/evaluate.py read back from a folder: each measure, with its rows if they were kept.

A kind of result is one entry of KINDS: its file, a test of its record, and a reader, which has a file of its own here.
A reader returns measures, conditions (which must agree before two results are compared) and notes (which may differ and
are then reported).
"""

from train.evaluation.results.kinds import KINDS
from train.evaluation.results.measures import Measure, Results, folder_of
from train.evaluation.results.reading import read_before, read_results

__all__ = ["KINDS", "Measure", "Results", "folder_of", "read_before", "read_results"]
