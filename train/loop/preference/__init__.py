"""Preference training: DPO, ORPO and reward models on packed pairs; the reference's log-probabilities."""
