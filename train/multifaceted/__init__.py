"""Multifaceted Collection and Bench (Lee et al. 2024, arXiv:2405.17977): data of many preferences."""
