"""Preference training: DPO and ORPO on packed pairs, the reference's log-probabilities, and the trainer."""
