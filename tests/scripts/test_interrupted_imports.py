"""Ctrl-C while a command imports its modules."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


class _Interrupt:
    """Importer that raises KeyboardInterrupt at one module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("sysgen", "train.sysgen.run"),
        ("collection", "train.multifaceted.collection.run"),
        ("evaluate", "train.evaluation.bench"),
    ],
)
def test_ctrl_c_during_imports_ends_without_a_traceback(
    script: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    package, _, name = module.rpartition(".")
    if package in sys.modules:  # an earlier test may have imported it
        monkeypatch.delattr(sys.modules[package], name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupt(module), *sys.meta_path])
    monkeypatch.syspath_prepend(SCRIPTS)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 130
