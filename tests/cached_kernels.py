"""Kernels in Python in a cache of the hub, for tests with the package `kernels` where that is installed."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from train.model.hub_kernels import HubKernel, package_is_missing

with_package = pytest.mark.skipif(package_is_missing(), reason="the package kernels is not installed")
without_package = pytest.mark.skipif(not package_is_missing(), reason="the package kernels is installed")


def put_in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, kernel: HubKernel, source: str) -> None:
    """Make `cache` the hub's cache and write a kernel there, for any machine, as one that was downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folder, commit = cache / f"kernels--{kernel.repo_id.replace('/', '--')}", "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / (kernel.revision or f"v{kernel.version}")).write_text(commit)
    build = folder / "snapshots" / commit / "build" / "torch-cpu"
    build.mkdir(parents=True)
    metadata = {
        "id": "x", "name": kernel.repo_id.partition("/")[2], "version": 1, "license": "mit", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "__init__.py").write_text(source)
