"""Batch script, checks before submitting, and checks of the nodes of a Slurm job."""
