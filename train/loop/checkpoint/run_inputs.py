"""Contents of the local files that decide what a run trains: rows, template, configuration files, base model.

Rows are compared by every byte that they are read from, without file names. Weights are compared by size and evenly
spaced samples: training changes them everywhere, and many gigabytes are read in a second. Data sets and models of a hub
are assumed to be unchanged.
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
from train.loop.checkpoint.manifest import describe_file
from train.model.folder import INDEX, WEIGHTS
from train.recipe import Recipe, TrainingSource
from train.recipe.sft_config import CONFIG_FILES
from train.storage.local_paths import looks_like_hub_id

BASE_MODEL = "files of model.name_or_path"
"""Key of their contents, which no recipe has."""
_GAINS = "files of min_gain"
"""Key of their contents, in the order of the sources that have one."""
_BESIDE_WEIGHTS = (
    *("config.json", "*_config.json", "*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
)
_CODE = ("*.py",)
_INDICES = (INDEX, "pytorch_model.bin.index.json")
_SAMPLES, _BYTES_OF_A_SAMPLE = 256, 1 << 16

Contents = dict[str, list[dict[str, Any]]]
"""For each key that names local files, the `file` and the `content` of each; None if it can't be read."""


def describe_contents(recipe: Recipe) -> Contents:
    """Return the contents of the local files that the recipe names. Keys that name none are left out."""
    sections = {"data.sources": recipe.data.sources, "data.validation": recipe.data.validation}
    contents = {
        key: [{"file": source.path, "content": _describe_rows(source, recipe.data.allow_pickle)} for source in sources]
        for key, sources in sections.items()
        if isinstance(sources, list | tuple)
    }
    sources = [source for part in sections.values() if isinstance(part, tuple) for source in part]
    if gains := [source.min_gain for source in sources if source.min_gain]:
        contents[_GAINS] = [{"file": file, "content": describe_file(Path(file))} for file in gains]
    files = {f"training.{name}": recipe.training.get(name) for name in CONFIG_FILES}
    if str(recipe.chat.template).endswith(".jinja"):
        files["chat.template"] = recipe.chat.template
    for key, name in files.items():
        if isinstance(name, str):
            contents[key] = [{"file": name, "content": describe_file(Path(name))}]
    folder = Path(recipe.model.name_or_path)
    if folder.is_dir():
        contents["model.name_or_path"] = [{"file": str(folder), "content": os.path.abspath(folder)}]
        contents[BASE_MODEL] = [
            {"file": name, "content": description and {"name": name, **description}}
            for name, description in describe_model_files(folder, trust_remote_code=recipe.model.trust_remote_code)
        ]
    return contents


def describe_model_files(folder: Path, *, trust_remote_code: bool) -> list[tuple[str, dict[str, Any] | None]]:
    """Return the name and the description of each file that a model is loaded from; None if it can't be read."""
    beside = list_files_beside_weights(folder, _CODE if trust_remote_code else ())
    weights = [(name, describe_by_samples(folder / name)) for name in _list_weights(folder)]
    return [(name, describe_file(folder / name)) for name in beside] + weights


def without_paths(contents: Contents) -> dict[str, list[Any]]:
    """Return the contents without the paths of their files, for comparing two runs."""
    return {key: [entry["content"] for entry in entries] for key, entries in contents.items()}


def list_changed_files(
    before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]], folder: str
) -> Iterator[str]:
    """Yield a message for each file of one key that has changed. `folder`: that of relative paths."""
    old, new = ({entry["file"]: entry["content"] for entry in entries} for entries in (before, now))
    for file in sorted(old.keys() | new.keys()):
        if old.get(file) != new.get(file):
            yield f"{Path(folder, file)} {'has changed since' if new.get(file) else 'is missing or damaged'}"


def list_files_beside_weights(folder: Path, more: Iterable[str] = ()) -> list[str]:
    """Return the names of the files that weights are loaded with: configuration, tokenizer, template.

    `more`: further patterns of names.
    """
    paths = {path for pattern in (*_BESIDE_WEIGHTS, *more) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def describe_by_samples(path: Path) -> dict[str, Any] | None:
    """Return size and checksum of a file, above 16 MiB of evenly spaced samples; None if it can't be read."""
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


def _describe_rows(source: TrainingSource, allow_pickle: bool) -> dict[str, Any] | None:
    """Return a source's settings with a checksum of its rows in place of its path. A hub's source keeps its id."""
    settings = source.model_dump(mode="json")
    if source.min_gain:
        settings["min_gain"] = "one of " + _GAINS
    if not (Path(source.path).exists() or glob.has_magic(source.path)) and looks_like_hub_id(source.path):
        return settings
    try:
        return {**settings, "path": None, "rows": open_source(source, allow_pickle).digest()}
    except UserError:
        return None


def _list_weights(folder: Path) -> list[str]:
    """Return the names of the weight files that transformers loads: of several layouts, the first."""
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
