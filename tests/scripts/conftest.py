"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CompletedProcess[str]]:
    """Return a function that runs benchmark.py in this process; what it measures runs in processes of its own."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmark import main

    def run(*arguments: object) -> CompletedProcess[str]:
        capsys.readouterr()
        words = [str(argument) for argument in arguments]
        return CompletedProcess(words, main(words), *capsys.readouterr())

    return run


@pytest.fixture
def refused(benchmark: Callable[..., CompletedProcess[str]]) -> Callable[..., str]:
    """Return a function that runs benchmark.py in this process; it must exit with 2; returns standard error."""

    def run(*arguments: object) -> str:
        ended = benchmark(*arguments)
        assert ended.returncode == 2
        return ended.stderr

    return run
