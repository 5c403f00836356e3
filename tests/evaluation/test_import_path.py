"""The started process of scripts/evaluate.py: its folder is not on the import path."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = """
import importlib.util
print("evaluate is", importlib.util.find_spec("evaluate"))
RULES = {}
"""


def test_import_evaluate_does_not_find_the_script(tmp_path: Path) -> None:
    """Tasks of lm-evaluation-harness import Hugging Face's package of that name."""
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").touch()
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    arguments = ["rules", "--rules", tmp_path / "rules.py", "--data", "d", "--before", "b", "--after", "a"]
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "evaluate.py", *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, "holds no RULES" in run.stderr) == (2, True)
    assert str(tmp_path / "evaluate" / "__init__.py") in run.stdout
    assert "scripts" not in run.stdout
