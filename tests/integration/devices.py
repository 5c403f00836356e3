"""Devices of tests that run on a GPU, and on a CPU where there is none."""

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
GPU = (pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device"))
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="runs on the GPU here")),
    pytest.param("cuda", marks=GPU),
]
