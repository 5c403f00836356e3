"""Contents of the local files that decide what a run trains: rows, template, configuration files, base model.

Rows count with every byte that they are read from, and without the names of files. Weights count with their size and
evenly spaced samples: training changes them everywhere, and a base of many gigabytes is told in a second, also once it
was copied. Data sets and models of a hub are taken to be unchanged.
"""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from train.data.sources.source import open_source
from train.errors import UserError
from train.loop.checkpoint.manifest import described
from train.model.folder import INDEX, WEIGHTS
from train.recipe import Recipe, Source
from train.recipe.sft_config import CONFIG_FILES
from train.storage.local_paths import looks_like_hub_id

BASE_MODEL = "files of model.name_or_path"
"""The key of their contents: one that no recipe has."""
_BESIDE_WEIGHTS = (
    *("config.json", "*_config.json", "*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
)
_CODE = ("*.py",)
_INDICES = (INDEX, "pytorch_model.bin.index.json")
_SAMPLES, _BYTES_OF_A_SAMPLE = 256, 1 << 16

Contents = dict[str, list[dict[str, Any]]]
"""For each key that names local files, the `file` and the `content` of each: None where it is gone or can't be read."""


def contents(recipe: Recipe) -> Contents:
    """Return the contents of the local files that the recipe names. A key that names none is left out."""
    parts = {"data.sources": recipe.data.sources, "data.validation": recipe.data.validation}
    found = {
        key: [{"file": source.path, "content": _rows(source, recipe.data.allow_pickle)} for source in sources]
        for key, sources in parts.items()
        if isinstance(sources, list | tuple)
    }
    named = {f"training.{name}": recipe.training.get(name) for name in CONFIG_FILES}
    if str(recipe.chat.template).endswith(".jinja"):
        named["chat.template"] = recipe.chat.template
    for key, name in named.items():
        if isinstance(name, str):
            found[key] = [{"file": name, "content": described(Path(name))}]
    folder = Path(recipe.model.name_or_path)
    if folder.is_dir():
        found["model.name_or_path"] = [{"file": str(folder), "content": os.path.abspath(folder)}]
        beside = files_beside_weights(folder, _CODE if recipe.model.trust_remote_code else ())
        described_files = {name: described(folder / name) for name in beside}
        described_files |= {name: sampled(folder / name) for name in _weights(folder)}
        found[BASE_MODEL] = [
            {"file": name, "content": written and {"name": name, **written}}
            for name, written in described_files.items()
        ]
    return found


def contents_alone(found: Contents) -> dict[str, list[Any]]:
    """Return what tells two runs apart: the contents, without the paths of their files."""
    return {key: [entry["content"] for entry in entries] for key, entries in found.items()}


def changed_files(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]], folder: str) -> Iterator[str]:
    """Yield each of the files under one key that is another one now. `folder`: where those are that have a name."""
    then, since = ({entry["file"]: entry["content"] for entry in entries} for entries in (before, now))
    for file in sorted(then.keys() | since.keys()):
        if then.get(file) != since.get(file):
            yield f"{Path(folder, file)} {'has changed since' if since.get(file) else 'is missing or damaged'}"


def files_beside_weights(folder: Path, more: Iterable[str] = ()) -> list[str]:
    """Return the names of the files that weights are loaded with: configuration, tokenizer, template.

    `more`: patterns of other names.
    """
    found = {path for pattern in (*_BESIDE_WEIGHTS, *more) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def sampled(path: Path) -> dict[str, Any] | None:
    """Return size and checksum of a file, if over 16 MiB of evenly spaced samples; None where it can't be read."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            last = max(size - _BYTES_OF_A_SAMPLE, 0)
            for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
                stream.seek(start)
                digest.update(stream.read(_BYTES_OF_A_SAMPLE))
    except OSError:
        return None
    return {"bytes": size, "samples": digest.hexdigest()}


def _rows(source: Source, allow_pickle: bool) -> dict[str, Any] | None:
    """Return a source's settings with a checksum of its rows in the place of its path. A hub's keeps its id."""
    settings = source.model_dump(mode="json")
    if not (Path(source.path).exists() or glob.has_magic(source.path)) and looks_like_hub_id(source.path):
        return settings
    try:
        return {**settings, "path": None, "rows": open_source(source, allow_pickle).digest()}
    except UserError:
        return None


def _weights(folder: Path) -> list[str]:
    """Return the names of the files of weights that transformers reads: of several layouts, the first."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    for index in _INDICES:
        try:
            return sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if names := sorted(path.name for path in folder.glob(pattern)):
            return names
    return []
