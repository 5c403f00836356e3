"""SYSGEN (Jeong et al. 2025, arXiv:2502.11330): system messages for data that has none, by open models."""
