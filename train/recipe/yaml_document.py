"""A recipe's text as plain values, each with the line it came from: YAML 1.2 scalars, no duplicate key, no secret."""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from train.errors import UserError
from train.recipe.sft_config import training_fields

KeyPath = tuple[str | int, ...]
"""A dotted key in its parts; an item of a list by its index."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: PyYAML's 1.1 reads 5e-6 as text, and `no` as false."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way)


class RecipeDumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out each time it comes."""
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in _Loader, RecipeDumper:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text, 0) if text.startswith(("0o", "0x")) else int(text),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}

_SYNTAX_HINTS = {
    "mapping values are not allowed": "A value that holds `: ` needs quotes; keys of a section stand in one column.",
    "found character '\\t'": "Indent with spaces, not with tabs.",
    "could not find expected ':'": "A line is `key: value`, with a space after the colon.",
    "expected <block end>": "Keys of a section stand in one column, each as `key: value`.",
    "expected ',' or": "A bracket is not closed, or a comma is missing.",
    "unexpected end of stream": "A quote is not closed.",
    "undefined alias": "A value that begins with * needs quotes.",
    "another document": "A recipe is one document: remove what follows the second `---`.",
    "cannot start any token": "A value that begins with @, % or ` needs quotes.",
}

SECRET = re.compile(
    r"secret|passw(or)?d|api[_-]?key|(access|private|auth)[_-]?key|credential|authorization|bearer|token$",
    re.IGNORECASE,
)
"""Names of keys that hold a secret."""
_MOST_VALUES = 10_000  # far beyond any recipe: what has more grows from YAML aliases


class Place(NamedTuple):
    """Where a value was written: its rank in the report (the line; overrides come last) and in words."""

    order: int
    words: str


class YamlError(Exception):
    """Text that is no YAML."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Document:
    """A recipe as plain values, with the place that each came from and all that was found wrong so far."""

    def __init__(self, path: Path, keys: Sequence[str] = ("model", "data", "output_dir")) -> None:
        """Read `path`, of which `keys` must be given. Raises UserError where there is no mapping to be had from it."""
        self.name = str(path)
        self.places: dict[KeyPath, Place] = {(): self._line(1)}
        self.faults: list[tuple[Place, str]] = []
        self._values = 0
        try:
            root = compose(_read_text(path))
            tree = None if root is None else self._build(root, (), lambda node: self._line(node.start_mark.line + 1))
        except YamlError as fault:
            raise UserError(f"{self.name}:{fault.line}: {fault}") from fault
        if tree is None:
            raise UserError(f"{self.name}: empty. It must have at least the keys {', '.join(keys)}.")
        if not isinstance(tree, dict):
            expected = f"Expected a mapping with the keys {', '.join(keys)}, ..., each as `key: value`"
            raise UserError(f"{self.name}:1: found {described(tree)} at the top. {expected}.")
        self.tree: dict[str, Any] = tree

    def override(self, text: str, order: int) -> None:
        """Put the value of `key=value` into the tree."""
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        shown = f"{key}=..." if any(map(SECRET.search, re.findall(r"[\w-]+", text))) else text
        shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
        place = Place(1_000_000_000 + order, f"override `{shown}`")
        if not equals or not all(parts):
            self.faults.append((place, "expected key=value, such as training.learning_rate=1e-5."))
            return
        container: Any = self.tree
        path: KeyPath = ()
        for depth, part in enumerate(parts):
            if isinstance(container, list):
                if not (part.isascii() and part.isdigit() and int(part) < len(container)):
                    here = f"{dotted(path)} has {len(container)} items, numbered from 0"
                    self.faults.append((place, f"{here}; there is no {part}."))
                    return
                step: str | int = int(part)
            elif isinstance(container, dict):
                step = part
            else:
                self.faults.append((place, f"{dotted(path)} is {described(container)}: it has no keys below it."))
                return
            path = (*path, step)
            if depth == len(parts) - 1:
                break
            if isinstance(container, dict) and container.get(part) is None:
                container[part] = {}
                self.places[path] = place
            container = container[step]
        self.places = {known: where for known, where in self.places.items() if known[: len(path)] != path}
        self.places[path] = place
        try:
            node = compose(value)
            container[step] = None if node is None else self._build(node, path, lambda _: place)
        except YamlError as fault:
            self.faults.append((place, str(fault)))

    def refuse_secrets(self, variables: str = "HF_TOKEN, WANDB_API_KEY") -> None:
        """Take every key out whose name speaks of a secret, and report it without its value.

        `variables`: the environment variables to set instead, for the message.
        """
        for path in list(_paths(self.tree)):
            key = path[-1]
            if not isinstance(key, str) or not SECRET.search(key):
                continue
            if path[:-1] == ("training",) and key in training_fields():
                continue  # eos_token and its like; hub_token is refused by name
            del value_at(self.tree, path[:-1])[key]
            why = "a recipe holds no secrets, for it is copied into output_dir and into logs"
            self.fault(path, f"{why}. Set them in the environment ({variables}).")

    def fault(self, path: KeyPath, message: str) -> None:
        """Note what is wrong with the key at `path`, which may be missing: then its section tells the place."""
        known = next(path[:length] for length in range(len(path), -1, -1) if path[:length] in self.places)
        self.faults.append((self.places[known], f"{dotted(path)}: {message}"))

    def _line(self, line: int) -> Place:
        return Place(line, f"{self.name}:{line}")

    def section(self, name: str) -> dict[str, Any]:
        """The section called `name`, empty where it is missing or no section."""
        section = self.tree.get(name)
        return section if isinstance(section, dict) else {}

    def _build(self, node: yaml.Node, path: KeyPath, place: Callable[[yaml.Node], Place]) -> Any:
        """The value that `node` stands for. Notes the place of each key; duplicate keys and foreign tags are faults."""
        self._values += 1
        if self._values > _MOST_VALUES or len(path) > 50:
            raise YamlError(node.start_mark.line + 1, "more values than a recipe can have. Write it without aliases.")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    self.faults.append((place(key_node), f"{dotted(path)}: a key must be text."))
                    continue
                here = (*path, key_node.value)
                if key_node.value in mapping:
                    message = f"{dotted(here)}: given twice, first in {self.places[here].words}. Keep one of them."
                    self.faults.append((place(key_node), message))
                    continue
                self.places[here] = place(key_node)
                mapping[key_node.value] = self._build(value_node, here, place)
            return mapping
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            for index, item in enumerate(node.value):
                self.places[*path, index] = place(item)
            return [self._build(item, (*path, index), place) for index, item in enumerate(node.value)]
        try:
            return _SCALARS[kind](node.value)
        except (KeyError, ValueError, TypeError):
            self.faults.append(
                (place(node), f"{dotted(path)}: the tag {node.tag} is not allowed. Write a plain value.")
            )
            return node.value


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe.{near_files(str(path))}") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(found.name for found in path.glob("*.yaml"))) or "it has none of its own"
        raise UserError(f"{path}: a folder. Give one of the recipes in it: {inside}.") from None
    except OSError as fault:
        raise UserError(f"{path}: can't be read: {fault.strerror}.") from fault
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw.count(b"\n", 0, fault.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{raw[fault.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from fault


def compose(text: str) -> yaml.Node | None:
    """The YAML nodes of `text`. Raises YamlError with its line and what was expected."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as fault:
        line = text.count("\n", 0, fault.position) + 1
        raise YamlError(line, f"character U+{ord(text[fault.position]):04X} is not allowed in YAML.") from fault
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        since = (
            f" ({fault.context}, line {fault.context_mark.line + 1})" if fault.context and fault.context_mark else ""
        )
        problem = f"{fault.problem}"
        hints = [hint for words, hint in _SYNTAX_HINTS.items() if words in problem]
        expected = hints[0] if hints else "Expected lines of `key: value`, indented with spaces."
        raise YamlError(mark.line + 1 if mark else 1, f"not valid YAML: {problem}{since}. {expected}") from fault
    except RecursionError as fault:
        raise YamlError(1, "not valid YAML: nested too deeply.") from fault


def near_files(missing: str) -> str:
    """A hint at a file of a similar name: beside where it was looked for, or among the recipes below this folder."""
    path = Path(missing)
    found = [file for file in path.parent.glob("*") if file.is_file()]
    if path.suffix in (".jinja", ".json"):  # keys that take no other kind
        found = [file for file in found if file.suffix == path.suffix]
    beside = [str(path.with_name(file.name)) for file in found]
    known = [str(file) for file in Path("recipes").glob("**/*.yaml")] if path.suffix in (".yaml", ".yml") else []
    return did_you_mean(closest(missing, [*beside, *known], 0.6))


def closest(text: str, among: Sequence[str], cutoff: float) -> str | None:
    """The text in `among` most like `text`, if any is at least `cutoff` like it (0 to 1)."""
    return next(iter(difflib.get_close_matches(text, among, 1, cutoff)), None)


def did_you_mean(meant: str | None) -> str:
    """A question to put behind an error; nothing where nothing is likely."""
    return f" Did you mean `{meant}`?" if meant else ""


def dotted(path: KeyPath) -> str:
    """The key as a user writes it."""
    return ".".join(map(str, path)) or "the top level"


def value_at(tree: Any, path: KeyPath) -> Any:
    """The value that stands at `path` below `tree`."""
    for step in path:
        tree = tree[step]
    return tree


def _paths(tree: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all values below `tree`, the deepest first."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))
        yield (*path, key)


def described(value: Any) -> str:
    """What was found, in YAML's words."""
    match value:
        case None:
            return "nothing (null)"
        case "":
            return "an empty text"
        case dict():
            return "a section"
        case list():
            return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else f"{text[:57]}..."
