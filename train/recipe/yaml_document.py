"""YAML documents of recipes: plain values with the line of each, YAML 1.2 scalars, no duplicate keys, no secrets."""

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
"""Parts of a dotted key; list items by index."""


class _Loader(yaml.SafeLoader):
    """Loader with YAML 1.2 scalars: PyYAML's YAML 1.1 reads 5e-6 as text, and `no` as false."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's convention)


class RecipeDumper(yaml.SafeDumper):
    """Dumper that quotes all texts that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: repeat a value instead of writing an alias."""
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
    "mapping values are not allowed": "Quote values that contain `: `; keys of a section need the same indentation.",
    "found character '\\t'": "Indent with spaces, not with tabs.",
    "could not find expected ':'": "A line is `key: value`, with a space after the colon.",
    "expected <block end>": "Keys of a section need the same indentation, each as `key: value`.",
    "expected ',' or": "A bracket is not closed, or a comma is missing.",
    "unexpected end of stream": "A quote is not closed.",
    "undefined alias": "Quote values that start with *.",
    "another document": "A recipe is one document: remove everything after the second `---`.",
    "cannot start any token": "Quote values that start with @, % or `.",
}

SECRET = re.compile(
    r"secret|passw(or)?d|api[_-]?key|(access|private|auth)[_-]?key|credential|authorization|bearer|token$",
    re.IGNORECASE,
)
"""Names of keys that hold a secret."""
_MAX_VALUES = 10_000  # far beyond any recipe: more can only come from nested YAML aliases


class Location(NamedTuple):
    """Source of a value: a line of the file or an override. `order` sorts errors by line, those of overrides last."""

    order: int
    text: str
    is_override: bool = False


class YamlError(Exception):
    """Invalid YAML at `line`."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Document:
    """A recipe as plain values, with the location of each and the errors found so far."""

    def __init__(self, path: Path | None, keys: Sequence[str] = ("model", "data", "output_dir")) -> None:
        """Read `path`; messages name `keys` as the required ones. None: all values come from the command line.

        Raises UserError if the file holds no mapping.
        """
        self.name = str(path) if path else "command line"
        self.locations: dict[KeyPath, Location] = {(): self._line(1) if path else Location(0, self.name)}
        self.errors: list[tuple[Location, str]] = []
        self._values = 0
        self.tree: dict[str, Any] = self._read(path, keys) if path else {}

    def _read(self, path: Path, keys: Sequence[str]) -> dict[str, Any]:
        try:
            root = compose(_read_text(path))
            tree = None if root is None else self._build(root, (), lambda node: self._line(node.start_mark.line + 1))
        except YamlError as error:
            raise UserError(f"{self.name}:{error.line}: {error}") from error
        if tree is None:
            raise UserError(f"{self.name}: empty. Required keys: {', '.join(keys)}.")
        if not isinstance(tree, dict):
            expected = f"Expected a mapping with the keys {', '.join(keys)}, ..., each as `key: value`"
            raise UserError(f"{self.name}:1: found {describe_value(tree)} at the top level. {expected}.")
        return tree

    def override(self, text: str, order: int) -> None:
        """Apply an override `key=value` to the tree; `order`: its position on the command line."""
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        shown = f"{key}=..." if any(map(SECRET.search, re.findall(r"[\w-]+", text))) else text
        shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
        location = Location(1_000_000_000 + order, f"override `{shown}`", is_override=True)
        if not equals or not all(parts):
            self.errors.append((location, "expected key=value, such as training.learning_rate=1e-5."))
            return
        container: Any = self.tree
        path: KeyPath = ()
        for depth, part in enumerate(parts):
            if isinstance(container, list):
                if not (part.isascii() and part.isdigit() and int(part) < len(container)):
                    items = f"{dotted_key(path)} has {len(container)} items, numbered from 0"
                    self.errors.append((location, f"{items}; there is no {part}."))
                    return
                step: str | int = int(part)
            elif isinstance(container, dict):
                step = part
            else:
                self.errors.append((location, f"{dotted_key(path)} is {describe_value(container)} and has no keys."))
                return
            path = (*path, step)
            if depth == len(parts) - 1:
                break
            if isinstance(container, dict) and container.get(part) is None:
                container[part] = {}
                self.locations[path] = location
            container = container[step]
        self.locations = {other: source for other, source in self.locations.items() if other[: len(path)] != path}
        self.locations[path] = location
        try:
            node = compose(value)
            container[step] = None if node is None else self._build(node, path, lambda _: location)
        except YamlError as error:
            self.errors.append((location, str(error)))

    def refuse_secrets(self, variables: str = "HF_TOKEN, WANDB_API_KEY") -> None:
        """Remove each key whose name suggests a secret, and add an error that doesn't show its value.

        `variables`: environment variables to set instead, for the message.
        """
        for path in list(_paths(self.tree)):
            key = path[-1]
            if not isinstance(key, str) or not SECRET.search(key):
                continue
            if path[:-1] == ("training",) and key in training_fields():
                continue  # eos_token and others; hub_token is refused by name
            del value_at(self.tree, path[:-1])[key]
            reason = "a recipe holds no secrets, because it is copied into output_dir and logs"
            self.add_error(path, f"{reason}. Set them in the environment ({variables}).")

    def add_error(self, path: KeyPath, message: str) -> None:
        """Add an error about the key at `path`; a missing key is located by its section."""
        nearest = next(path[:length] for length in range(len(path), -1, -1) if path[:length] in self.locations)
        self.errors.append((self.locations[nearest], f"{dotted_key(path)}: {message}"))

    def raise_errors(self) -> None:
        """Raise UserError with all errors found so far, by line; do nothing if there are none."""
        lines = [f"{location.text}: {message}" for location, message in sorted(self.errors)]
        if len(lines) == 1:
            raise UserError(lines[0])
        if lines:
            raise UserError("\n  ".join([f"{self.name} has {len(lines)} errors:", *lines]))

    def _line(self, line: int) -> Location:
        return Location(line, f"{self.name}:{line}")

    def section(self, name: str) -> dict[str, Any]:
        """Return the section `name`; empty where it is missing or not a mapping."""
        section = self.tree.get(name)
        return section if isinstance(section, dict) else {}

    def _build(self, node: yaml.Node, path: KeyPath, locate: Callable[[yaml.Node], Location]) -> Any:
        """Return the value of `node` and record the location of each key; duplicate keys and custom tags are errors."""
        self._values += 1
        if self._values > _MAX_VALUES or len(path) > 50:
            raise YamlError(node.start_mark.line + 1, "more values than a recipe can have. Write it without aliases.")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    self.errors.append((locate(key_node), f"{dotted_key(path)}: a key must be text."))
                    continue
                key_path = (*path, key_node.value)
                if key_node.value in mapping:
                    first = self.locations[key_path].text
                    message = f"{dotted_key(key_path)}: given twice, first in {first}. Keep one of them."
                    self.errors.append((locate(key_node), message))
                    continue
                self.locations[key_path] = locate(key_node)
                mapping[key_node.value] = self._build(value_node, key_path, locate)
            return mapping
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            for index, item in enumerate(node.value):
                self.locations[*path, index] = locate(item)
            return [self._build(item, (*path, index), locate) for index, item in enumerate(node.value)]
        try:
            return _SCALARS[kind](node.value)
        except (KeyError, ValueError, TypeError):
            message = f"{dotted_key(path)}: the tag {node.tag} is not allowed. Write a plain value."
            self.errors.append((locate(node), message))
            return node.value


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: this recipe doesn't exist.{suggest_files(str(path))}") from None
    except IsADirectoryError:
        recipes = ", ".join(sorted(recipe.name for recipe in path.glob("*.yaml"))) or "it has none"
        raise UserError(f"{path}: a folder. Give one of the recipes in it: {recipes}.") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def compose(text: str) -> yaml.Node | None:
    """Return the YAML nodes of `text`. Raises YamlError with the line and what was expected."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"character U+{ord(text[error.position]):04X} is not allowed in YAML.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = (
            f" ({error.context}, line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
        )
        problem = f"{error.problem}"
        hints = [hint for phrase, hint in _SYNTAX_HINTS.items() if phrase in problem]
        expected = hints[0] if hints else "Expected lines of `key: value`, indented with spaces."
        raise YamlError(mark.line + 1 if mark else 1, f"not valid YAML: {problem}{context}. {expected}") from error
    except RecursionError as error:
        raise YamlError(1, "not valid YAML: nested too deeply.") from error


def suggest_files(missing: str) -> str:
    """Return a hint at a file of a similar name in the same folder or, for YAML files, below recipes/."""
    path = Path(missing)
    files = [file for file in path.parent.glob("*") if file.is_file()]
    if path.suffix in (".jinja", ".json"):  # their keys take no other kind of file
        files = [file for file in files if file.suffix == path.suffix]
    siblings = [str(path.with_name(file.name)) for file in files]
    recipes = [str(file) for file in Path("recipes").glob("**/*.yaml")] if path.suffix in (".yaml", ".yml") else []
    return did_you_mean(closest_match(missing, [*siblings, *recipes], 0.6))


def closest_match(text: str, candidates: Sequence[str], cutoff: float) -> str | None:
    """Return the candidate most similar to `text`; None where none has a similarity (0 to 1) of at least `cutoff`."""
    return next(iter(difflib.get_close_matches(text, candidates, 1, cutoff)), None)


def did_you_mean(suggestion: str | None) -> str:
    """Return a question to append to an error; empty without a suggestion."""
    return f" Did you mean `{suggestion}`?" if suggestion else ""


def dotted_key(path: KeyPath) -> str:
    """Return the key as users write it."""
    return ".".join(map(str, path)) or "the top level"


def value_at(tree: Any, path: KeyPath) -> Any:
    """Return the value at `path` below `tree`."""
    for step in path:
        tree = tree[step]
    return tree


def _paths(tree: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the paths of all values below `tree`, the deepest first."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))
        yield (*path, key)


def describe_value(value: Any) -> str:
    """Return a description of a value in YAML's terms."""
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
