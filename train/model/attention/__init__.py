"""Attention kernels: selection, a test of the selected one, and FlashAttention from torch's own kernels."""
