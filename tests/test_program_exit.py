"""Start and end of commands: imports without garbage collections, and an exit that looks at no object again."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from train.cli import heavy_imports

ROOT = Path(__file__).parents[1]


def test_collections_pause_during_imports_alone() -> None:
    assert gc.isenabled()
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), heavy_imports():
        import train.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


@pytest.mark.parametrize("code", [0, 2])
def test_a_command_exits_with_its_code_and_leaves_nothing_to_the_last_collection(code: int) -> None:
    program = f"""
import atexit, gc
from train.cli import exit_with

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("collected")

def main():
    global cycle
    cycle = Cycle()
    print("done")
    return {code}

atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))
exit_with(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.splitlines() == ["done", "frozen True"]
