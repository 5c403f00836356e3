"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs benchmark.py in this process; it must exit with 2; returns standard error."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmark import main

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return run
