"""What is trained: weights, adapters, attention kernels."""
