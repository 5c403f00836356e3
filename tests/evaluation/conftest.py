"""What the tests of scripts/evaluate.py's commands share."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def evaluate_script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("evaluate_command_of_evaluation", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def command(evaluate_script: ModuleType) -> Callable[..., int]:
    """Runs a command of scripts/evaluate.py in this process: its exit code."""

    def run(*arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
            try:
                return evaluate_script.main()
            except SystemExit as end:  # argparse's own
                return int(end.code)

    return run


@pytest.fixture
def says_no(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that the user must mend: what it says after `error: `."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        return error.partition("error: ")[2].strip()

    return run
