"""Options of a command built from a pydantic section: one definition serves the command line and a YAML file.

    class Settings(Section):
        runs: int = Field(default=3, ge=1)
        '''Number of runs.'''

    add_options(parser, Settings)                 # --runs N   Number of runs. (default 3)
    settings = load_settings(options, Settings)   # the file of --config, overridden by the options given

The file is as strict as a recipe: unknown keys, wrong types and values out of bounds are refused with a suggestion.
"""

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from train.cli import duration_seconds, json_object
from train.recipe import Section
from train.recipe.validation import validate_settings
from train.recipe.yaml_document import Document, KeyPath, Location
from train.storage.local_paths import LocalPath

Settings = TypeVar("Settings", bound=Section)
_METAVARS = {int: "N", float: "X", dict: "JSON"}
_DURATIONS = ("wait_for_server",)


def add_options(parser: argparse.ArgumentParser, section: type[Section], *, common: Collection[str] = ()) -> None:
    """Add an option for each field of `section`. With `common`, --help lists only these and names the others."""
    for name, field in section.model_fields.items():
        option, kinds = option_of(name), _kinds(field.annotation)
        keywords: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if common and name not in common:
            keywords["help"] = argparse.SUPPRESS
        if bool in kinds:
            parser.add_argument(option, action="store_true", **keywords)
            continue
        keywords["metavar"] = _metavar(name, field)
        if name in _DURATIONS:
            keywords["type"] = duration_seconds
        elif dict in kinds:
            keywords["type"] = json_object
        if tuple in kinds:
            keywords |= {"action": "extend", "nargs": "+"}
        parser.add_argument(option, **keywords)
    if others := [option_of(name) for name in section.model_fields if common and name not in common]:
        parser.epilog = f"Less common options, documented as keys of the file of --config: {', '.join(others)}."


def load_settings(options: argparse.Namespace, section: type[Settings]) -> Settings:
    """Return the settings of the file of `options.config`, if any, overridden by the options that were given.

    Raises UserError with all errors, each with its line and key or with its option.
    """
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    document = _OptionsDocument(getattr(options, "config", None), required)
    document.refuse_secrets("a server's key in the variable that --key-variable or --judge-key-variable names")
    for name, value in vars(options).items():
        if name in section.model_fields:
            is_yaml = isinstance(value, str) and not _kinds(section.model_fields[name].annotation) & {str, Literal}
            document.set_option(name, value, is_yaml=is_yaml)
    return validate_settings(document, section)


def option_of(name: str) -> str:
    """Return the option that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


class _OptionsDocument(Document):
    """A configuration file, or none, with values from the command line."""

    def __init__(self, file: Path | None, required: list[str]) -> None:
        self._options: set[str | int] = set()
        self._has_file = file is not None
        super().__init__(file, required)

    def set_option(self, name: str, value: Any, *, is_yaml: bool) -> None:
        """Put the value of an option into the tree. `is_yaml`: it is text to be read as a YAML value."""
        order = len(self._options)
        if is_yaml:
            self.override(f"{name}={value}", order)
        else:
            self.tree[name] = value
        written = " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
        location = Location(1_000_000_000 + order, f"{option_of(name)} {written}".strip())
        self.locations = {path: old for path, old in self.locations.items() if path[:1] != (name,)} | {
            (name,): location
        }
        self._options.add(name)

    def add_error(self, path: KeyPath, message: str) -> None:
        """Note an error of the key at `path`, named as the option that set it or, without a file, has to set it."""
        if path and path[0] in self._options:
            keys = ".".join(key for key in path[1:] if isinstance(key, str))  # the number of a value says nothing
            within = f"{keys}: " if keys else ""
            self.errors.append((self.locations[path[:1]], f"{within}{message}"))
        elif path and not self._has_file:
            self.errors.append((self.locations[()], f"{option_of(str(path[0]))}: {message}"))
        else:
            super().add_error(path, message)


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types of an annotation without their arguments: str, int, Literal, tuple, ..."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {origin or annotation} - {NoneType}


def _marks(annotation: Any) -> Iterator[Any]:
    """Yield the metadata of an annotation and of its arguments."""
    yield from getattr(annotation, "__metadata__", ())
    for argument in get_args(annotation):
        yield from _marks(argument)


def _is_path(field: FieldInfo) -> bool:
    """Return whether a field, or the items of its list, are marked as paths."""
    return any(isinstance(mark, LocalPath) for mark in (*field.metadata, *_marks(field.annotation)))


def _metavar(name: str, field: FieldInfo) -> str:
    for part in (field.annotation, *get_args(field.annotation)):
        if get_origin(part) is Literal:
            return "{" + ",".join(map(str, get_args(part))) + "}"
    if _is_path(field):
        return "PATH"
    if name in _DURATIONS:
        return "TIME"
    return next(
        (_METAVARS[kind] for kind in _kinds(field.annotation) if kind in _METAVARS), name.rpartition("_")[2].upper()
    )


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).rstrip(".")
    if field.is_required():
        text += " (required)"
    elif isinstance(field.default, int | float) and not isinstance(field.default, bool):
        text += f" (default {field.default:g})"
    elif field.default and not isinstance(field.default, bool) and field.default_factory is None:
        text += f" (default {' '.join(field.default) if isinstance(field.default, tuple) else field.default})"
    return text.replace("%", "%%")
