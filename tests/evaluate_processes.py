"""scripts/evaluate.py in processes that a test starts and kills."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@cache
def evaluate_script() -> Any:
    """scripts/evaluate.py as a module: `import evaluate` may find a library of that name."""
    spec = importlib.util.spec_from_file_location("evaluate_in_a_process", ROOT / "scripts" / "evaluate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_process(folder: Path, *arguments: str | Path) -> None:
    """Entry point of a process that a test kills; its output goes to a file."""
    with (folder / "printed").open("a") as printed:
        sys.stdout = sys.stderr = printed
        sys.exit(evaluate_script().main([*map(str, arguments)]))
