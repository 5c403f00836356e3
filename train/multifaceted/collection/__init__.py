"""Multifaceted Collection (Lee et al. 2024, arXiv:2405.17977): system messages from preferences, and their answers."""
