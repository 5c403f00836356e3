"""The training itself: trainer, checkpoints, tracking, report."""
