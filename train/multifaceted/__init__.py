"""Multifaceted Collection and Bench (Lee et al. 2024, arXiv:2405.17977): build the data, grade the answers."""
