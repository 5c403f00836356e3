"""IFEval and S-IFEval: constraints that lm-evaluation-harness's own checkers verify."""
