"""The project's own rules of style that no linter has: openings of docstrings, and names that say what they hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(
    str(path.relative_to(ROOT))
    for top in ("train", "scripts", "tests")
    for path in (ROOT / top, *(ROOT / top).iterdir())
    if path.is_dir() and path.name != "__pycache__"
)
OPENINGS = re.compile(r"(What|How|Which|Whether|Where|Who|Why)\b")
VAGUE = frozenset(("one", "found", "chance", "fault", "made", "told", "known", "named"))
"""Names that say nothing of what they hold: write `row`, `matches`, `rng`, `error`, `plan`, `lines`, ..."""

RENAMED = re.compile(
    r"\b(Places|hand_out|give_back|most_at_risk|unwritten|Spent|Unanswered|NoAnswerError|Trouble|in_order|Pace|"
    r"EvenSequences|key_of|placed_rows|EpochOrder|keep_others_out|alone_in|leave_with_the_others|"
    r"leave_out_unhelpful_warnings|alone_by_mistake|telling_outcome|for_a_person|HARMLESS|facts_of_recipe|going_on|"
    r"first_fault|all_or_none)\b"
)


def sources(room: str) -> Iterator[tuple[Path, ast.Module]]:
    """Parse the files of a room; those directly in train/, scripts/ and tests/ are a room of their own."""
    folder = ROOT / room
    for path in sorted(folder.glob("*.py") if "/" not in room else folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find docstrings, also those under an assignment."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if isinstance(node, ast.stmt | ast.Module) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find the names that a file gives to variables, arguments, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)):
                yield node.lineno, name


@pytest.mark.parametrize("room", ROOMS)
def test_no_docstring_opens_with_a_question_word(room: str) -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line} {text[:60]!r}"
        for path, tree in sources(room)
        for line, text in docstrings(tree)
        if OPENINGS.match(text)
    ] == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_says_what_it_holds(room: str) -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in sources(room)
        for line, name in bound_names(tree)
        if name in VAGUE or RENAMED.fullmatch(name)
    ] == []
