"""Local paths: `~` and environment variables expanded, missing files named, paths told from hub ids."""

import argparse
import difflib
import os
import re
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*|[A-Za-z0-9][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILE_ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".txt", ".yaml", ".yml", ".jinja"),
    *(".gz", ".zst", ".zip", ".tar", ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib"),
)


@dataclass(frozen=True)
class LocalPath:
    """Mark of a key that takes a path, in the `Annotated` of its type: `~`, `$VAR` and `${VAR}` in it are expanded."""


def expanded(text: str) -> str:
    """Return `text` with `$VAR` and `${VAR}` replaced, and then a `~` or `~user` at its start.

    `$` before anything but a letter, `_` or `{` stays as it is. Raises ValueError, which names no key.
    """

    def value(match: re.Match[str]) -> str:
        name = match[2] if match[1] is None else match[1]
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"found {match[0]} in `{text}`. Only $NAME and ${{NAME}} are replaced")
        if not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise ValueError(f"the environment variable {name} in `{text}` is {state}. Set it, or write the path out")
        return os.environ[name]

    whole = _VARIABLE.sub(value, text)
    path = os.path.expanduser(whole)
    if whole.startswith("~") and path == whole:
        user = whole[1:].partition("/")[0]
        raise ValueError(f"`{text}`: there is no user {user} here. A name that begins with ~ is written ./{whole}")
    return path


def parse_path(text: str) -> Path:
    """Return an option's value as a path, expanded."""
    return Path(parse_path_or_id(text))


def parse_path_or_id(text: str) -> str:
    """Return an option's value expanded, as text: a path, or a word that is none."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def looks_like_hub_id(text: str) -> bool:
    """Return whether `text` may be an id on the Hugging Face hub: `owner/name`, or `name`.

    All else is a path, and no hub is ever asked for it: what begins with `.`, `/`, `~` or `$`, has more than one `/`, a
    backslash, a blank or another character that no id has, ends like a file, or begins with a folder that exists here.
    """
    if text.lower().endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(text):
        return False
    owner, slash, _ = text.partition("/")
    return not (slash and Path(owner).is_dir())


def describe_missing_path(path: Path) -> str:
    """Return a sentence that names the first part of `path` that does not exist, and what has nearly its name."""
    missing = next(part for part in [*reversed(path.parents), path] if not part.exists())
    return f"there is no {missing.name} in {missing.parent.absolute()}.{suggest_similar(path)}"


def suggest_similar(path: Path) -> str:
    """Return a question that names up to two existing paths of nearly the name of `path`; empty where none is."""
    missing = next((part for part in [*reversed(path.parents), path] if not part.exists()), path)
    folder, rest = missing.parent, path.relative_to(missing)
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    near = [folder / name for name in difflib.get_close_matches(missing.name, names, n=2, cutoff=0.7)]
    whole = [found / rest for found in near if (found / rest).exists()]
    return f" Did you mean {' or '.join(map(str, whole or near))}?" if near else ""


def hub_unreachable_reason(hub_id: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why `hub_id` can't be had now: it is in no cache, and the hub can't be asked. None where it may be had.

    Told in milliseconds: no request is made, the hub's name is looked up at most.
    """
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    # datasets keeps what it has prepared apart from what it has downloaded
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folders = [hub / f"{kind}s--{hub_id.replace('/', '--')}"]
    folders += [datasets / hub_id.replace("/", "___")] if kind == "dataset" else []
    if any(folder.exists() for folder in folders):
        return None
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif not _resolves(host := urlsplit(constants.ENDPOINT).hostname or ""):
        why = f"{host} can't be found from this machine"
    else:
        return None
    return f"it is not in the cache of the Hugging Face hub ({hub}), and the hub can't be asked: {why}"


def _resolves(host: str) -> bool:
    """Return whether the network knows `host`; true where a proxy would ask for us."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
