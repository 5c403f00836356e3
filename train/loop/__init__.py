"""Training loop: trainer, checkpoints, guards, metrics, preemption, report."""
