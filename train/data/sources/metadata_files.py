"""Metadata files: JSON files that describe a data set and hold no rows, as libraries and hubs write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.data.sources.formats import RowError, detect, read_row
from train.errors import UserError

_MAX_BYTES = 16 << 20
"""The description of very many configurations has a few megabytes; a larger file is data."""

STATE = "the state of a data set that datasets' save_to_disk wrote"


def describe_metadata_file(path: Path) -> str | None:
    """Return the kind of a metadata file, or None for any other file.

    The content decides: a file with rows that can be read is data, whatever else it holds. The name decides only if the
    content is one JSON object without rows of any known format: a metadata.json may be data.
    """
    value = _load_object(path)
    if value is None or _holds_rows(value, _is_readable):
        return None
    for kind, matches in _CONTENTS.items():
        if matches(value):
            return kind
    return None if _holds_rows(value, _is_row) else _NAMES.get(path.name.lower())


def is_saved_dataset(folder: Path) -> bool:
    """Return whether datasets' `save_to_disk` wrote a folder; other programs write a state.json too."""
    state = folder / "state.json"
    value = _load_object(state)
    return (folder / "dataset_dict.json").is_file() or (state.is_file() and (value is None or "_data_files" in value))


def _load_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that a file holds, or None if it holds anything else or is too large."""
    if path.suffix.lower() != ".json":
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        content = path.read_bytes()
        value = json.loads(content) if content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_description(value: Any) -> bool:
    """Return whether a value is the configuration of a data set in datasets' form: features, or sizes of splits."""
    if not isinstance(value, dict):
        return False
    splits, features = value.get("splits"), value.get("features")
    sized = isinstance(splits, dict) and any(
        isinstance(split, dict) and {"num_examples", "num_bytes"} & split.keys() for split in splits.values()
    )
    typed = isinstance(features, dict) and any(
        isinstance(feature, list) or (isinstance(feature, dict) and {"_type", "dtype", "feature"} & feature.keys())
        for feature in features.values()
    )
    return sized or typed


def _are_all(value: dict[str, Any], matches: Callable[[Any], bool]) -> bool:
    return bool(value) and all(map(matches, value.values()))


_LOCATIONS = frozenset(("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"))

_CONTENTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "LLaMA-Factory's list of data sets": lambda value: _are_all(
        value, lambda entry: isinstance(entry, dict) and bool(_LOCATIONS & entry.keys())
    ),
    STATE: lambda value: "_data_files" in value,
    "datasets' description of a data set": lambda value: _is_description(value) or _are_all(value, _is_description),
    "a Croissant description of a data set": lambda value: "@context" in value,
    "Kaggle's description of a data set": lambda value: {"id", "title", "licenses"} <= value.keys(),
    "a Frictionless data package": lambda value: isinstance(value.get("resources"), list)
    and all(isinstance(resource, dict) and "path" in resource for resource in value["resources"]),
}  # fmt: skip

_NAMES = {
    "dataset_infos.json": "datasets' description of a data set",
    "dataset_info.json": "a description of data sets",
    "dataset_dict.json": "the list of splits that datasets' save_to_disk wrote",
    "state.json": "the state of a program",
    "dataset-metadata.json": "Kaggle's description of a data set",
    **dict.fromkeys(
        ("metadata.json", "croissant.json", "datapackage.json", "manifest.json"), "a description of the data"
    ),
}


def _holds_rows(value: dict[str, Any], is_row: Callable[[dict[str, Any]], bool]) -> bool:
    """Return whether an object is a row, or holds rows directly: in lists, or by id."""
    below = [item[0] if isinstance(item, list) and item else item for item in value.values()]
    return any(isinstance(row, dict) and is_row(row) for row in [value, *below])


def _is_row(value: dict[str, Any]) -> bool:
    try:
        detect(value)
    except UserError:
        return False
    return True


def _is_readable(value: dict[str, Any]) -> bool:
    """Return whether a row can be read. (The features of a data set have the names of columns, but no texts.)"""
    try:
        read_row(value, detect(value), "")
    except (UserError, RowError):
        return False
    return True
