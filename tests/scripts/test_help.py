"""--help of all commands: 80 columns wide, with the lines of examples kept."""

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train/sft.py": [()],
    "train/preference.py": [()],
    "scripts/evaluate.py": [(), *((name,) for name in ("rules", "gain", "ifeval", "bench", "harness", "compare"))],
    "scripts/benchmark.py": [(), ("data",), ("train",), ("preference",), ("sysgen",)],
    "scripts/slurm/node_check.py": [()],
    **{
        f"scripts/{name}.py": [()]
        for name in ("prepare", "submit", "sysgen", "collection", "merge_adapter", "export_smollm2")
    },
}


def documentation(script: str, command: tuple[str, ...]) -> str:
    """Return the docstring that a command's help shows, read from its source."""
    own = {"ifeval": "ifeval/command", "train": "training"}
    source = ROOT / script
    if script == "scripts/evaluate.py" and command:
        source = ROOT / "train" / "evaluation" / f"{own.get(command[0], command[0])}.py"
    if script == "scripts/benchmark.py" and command:
        source = ROOT / "scripts" / "benchmarks" / f"{own.get(command[0], command[0])}.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def shown(script: str, command: tuple[str, ...]) -> str:
        path = ROOT / script
        monkeypatch.setattr(sys, "argv", [path.name, *command, "--help"])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path] if path.parent.name == "scripts" else sys.path)
        monkeypatch.setenv("COLUMNS", "80")
        spec = importlib.util.spec_from_file_location(f"help_of_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize(
    ("script", "command"), [(script, name) for script, names in COMMANDS.items() for name in names]
)
def test_help_has_80_columns_and_unwrapped_examples(script: str, command: tuple[str, ...], help_of) -> None:
    shown = help_of(script, command)
    assert max(map(len, shown.splitlines())) <= 80
    examples = re.findall(
        r"(?:^    \S.*\n?(?:^     .*\n?)*)+", shown.partition("\npositional")[0].partition("\noptions")[0], re.M
    )
    assert examples
    written = [line for line in documentation(script, command).splitlines() if line.startswith("    ")]
    assert [line for line in shown.splitlines() if line in written] == written
    joined = " ".join(" ".join(examples).replace("\\\n", " ").split())
    assert " ".join((script, *command)) in joined
    assert not set("[]").intersection(joined)
    for word in shlex.split(joined):
        if word.startswith(("recipes/", "accelerate_configs/")):
            assert (ROOT / word).exists()


def test_every_option_is_described(help_of) -> None:
    """argparse shows only the name of an option without a description."""
    for script, commands in COMMANDS.items():
        for command in commands:
            lines = help_of(script, command).splitlines()
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                if re.match(r"  -", line) and not re.match(r"  -\S.*\S {2,}\S", line):
                    assert following.startswith(" " * 20), f"{script} {command}: {line}"
