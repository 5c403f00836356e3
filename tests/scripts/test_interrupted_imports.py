"""Ctrl-C while a command loads its modules."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


class _Interrupt:
    """An importer that Ctrl-C hits at one module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("sysgen", "train.sysgen.stats"),
        ("collection", "train.multifaceted.collection.pipeline"),
        ("evaluate", "train.evaluation.bench"),
    ],
)
def test_it_ends_the_command_without_a_traceback(script: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, _, name = module.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr(sys.modules.get(package), name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupt(module), *sys.meta_path])
    monkeypatch.syspath_prepend(SCRIPTS)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 130
