"""System gain: how much likelier a model finds its answers under their own system message than under others."""
