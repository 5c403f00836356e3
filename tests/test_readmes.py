"""The READMEs: their links, the paths and the options that they name, and their length."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from train.data.sources.formats import detect
from train.errors import UserError
from train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
NAMES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SUBCOMMANDS = {
    "scripts/evaluate.py": ("rules", "gain", "ifeval", "hierarchy", "turns", "bench", "harness", "compare"),
    "scripts/benchmark.py": ("data", "start", "train", "preference", "saves", "sysgen"),
}
SCRIPTS = (
    *("train/sft.py", "scripts/evaluate.py", "scripts/benchmark.py", "scripts/prepare.py", "scripts/submit.py"),
    *("scripts/sysgen.py", "scripts/collection.py", "scripts/merge_adapter.py", "scripts/export_smollm2.py"),
)
OTHER_PROGRAMS = {
    "pip": {"--no-build-isolation", "--pre"},
    "python -m train.recipe": {"--schema"},
    "pytest": {"--durations", "--dist"},
    "sbatch": {"--export", "--constraint"},
    "scancel": {"--batch", "--signal"},
    "llama-server": {"--ctx-size"},
    "transformers serve": {"--device", "--port"},
    "transformers chat": {"--system-prompt"},
    "recipes/smollm2-135m/data/build.py": {"--output", "--rows"},
    "recipes/smollm2-135m/seeds.py": {"--seeds", "--recipe"},
}
"""Options that READMEs name and that are no command's of ours, or of a program without a help in this process."""


@cache
def options_of(script: str, subcommand: str | None = None) -> frozenset[str]:
    """Read the options that the help of a command lists, in this process."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    arguments = [path.name, *([subcommand] if subcommand else []), "--help"]
    import_path = [str(path.parent), str(ROOT), *sys.path] if path.parent.name == "scripts" else [str(ROOT), *sys.path]
    sys.modules[spec.name] = module  # patch.dict would forget what the script imports: its classes would exist twice
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(sys, "path", import_path),
        redirect_stdout(StringIO()) as output,
        suppress(SystemExit),
    ):
        spec.loader.exec_module(module)
        module.main()
    options = frozenset(OPTION.findall(output.getvalue()))
    assert options, arguments
    return options


@cache
def options_of_accelerate_launch() -> frozenset[str]:
    return frozenset(
        option.replace("-", "_").replace("__", "--", 1)
        for action in launch_command_parser()._actions
        for option in action.option_strings
    )


def prose_and_code(name: str) -> tuple[str, str]:
    """Split a page into its text outside of code blocks, and its blocks of shell commands."""
    text = (ROOT / name).read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), "\n".join(blocks)


def commands(name: str) -> Iterator[list[str]]:
    """Find the shell commands of a page as words: those of its blocks and those in its text."""
    prose, code = prose_and_code(name)
    for line in code.replace("\\\n", " ").splitlines():
        yield shlex.split(line, comments=True)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if re.match(r"(python|accelerate|make) ", span):
            yield shlex.split(span)


def anchors(path: Path) -> set[str]:
    """List the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_readmes() -> None:
    assert len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    prose, _ = prose_and_code(name)
    broken = []
    for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", prose):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        destination = ROOT / name if not path else (ROOT / name).parent / path
        if not destination.exists() or (anchor and anchor not in anchors(destination)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", NAMES)
def test_every_path_of_the_repository_that_is_named_is_there(name: str) -> None:
    text = re.sub(r"https?://\S+", "", (ROOT / name).read_text("utf-8"))
    paths = re.findall(
        r"(?<![\w./-])((?:recipes|scripts|accelerate_configs|ds_configs|train|tests)/[\w./-]*)(?![\w<*])", text
    )
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []
    for module in re.findall(r"python -m (train[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_options_that_it_is_shown_with(name: str) -> None:
    for words in commands(name):
        scripts = [index for index, word in enumerate(words) if word in SCRIPTS]
        if not scripts:
            continue
        script, arguments = words[scripts[0]], words[scripts[0] + 1 :]
        subcommand = next((word for word in arguments[:1] if word in SUBCOMMANDS.get(script, ())), None)
        options = {OPTION.match(word)[0] for word in arguments if OPTION.match(word)}
        assert options <= options_of(script, subcommand), words
        launcher = {OPTION.match(word)[0] for word in words[: scripts[0]] if OPTION.match(word)}
        assert launcher <= options_of_accelerate_launch(), words


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_named_is_that_of_some_command(name: str) -> None:
    ours = {
        option
        for script in SCRIPTS
        for subcommand in (None, *SUBCOMMANDS.get(script, ()))
        for option in options_of(script, subcommand)
    }
    prose, _ = prose_and_code(name)
    mentioned = {option for span in re.findall(r"`([^`]+)`", prose) for option in OPTION.findall(span)}
    assert mentioned - ours - options_of_accelerate_launch() - set().union(*OTHER_PROGRAMS.values()) == set()


def block(name: str, language: str) -> str:
    """Return the only code block of a page in a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return text


def test_the_sample_row_of_the_first_page_is_a_conversation_with_a_system_message() -> None:
    row = json.loads(block("README.md", "json"))
    assert detect(row) == "messages"
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_the_recipe_of_the_first_page_loads_and_has_every_section(tmp_path: Path) -> None:
    text = block("README.md", "yaml")
    (tmp_path / "my_recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "my_recipe.yaml")
    assert set(yaml.safe_load(text)) == set(type(recipe).model_fields)
    assert len(text.splitlines()) <= 20
    assert (ROOT / recipe.data.sources[0].path).is_file()


def test_the_error_of_the_first_page_is_what_its_recipe_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = """\
model:
  name_or_path: outputs/smollm2-135m-instruct
chat:
  template: mistral-sytem
data:
  sources: [{path: recipes/smollm2-135m/data/train.jsonl}]
  max_length: 512
learning_rate: 1.0e-4
output_dir: outputs/mine
"""
    (tmp_path / "my.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_recipe("my.yaml")
    assert f"```\nerror: {error.value}\n```" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "lines"), [("README.md", 220), ("AGENTS.md", 80)])
def test_the_first_pages_are_short(name: str, lines: int) -> None:
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= lines


@pytest.mark.parametrize("name", NAMES)
def test_nothing_names_this_machine(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert str(ROOT) not in text
    assert os.path.expanduser("~") + "/" not in text
