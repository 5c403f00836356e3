"""IFEval: rows with constraints, and the checkers of lm-evaluation-harness that judge answers to them."""
