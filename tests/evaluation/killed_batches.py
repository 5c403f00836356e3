"""A piece of a program whose process is killed at a batch of a local model."""

KILLED_AFTER_BATCHES = """
import os, signal, sys
from train.evaluation.models import local
left, generate_batch = int(sys.argv.pop(1)), local.generate_batch
def until_killed(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate_batch(*arguments, **options)
local.generate_batch = until_killed
"""
"""Its first argument: the number of batches before the kill."""
