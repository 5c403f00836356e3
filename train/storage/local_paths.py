"""Local paths: expansion of `~` and variables, hints at missing files, and the distinction from ids on the hub."""

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
    """Marker in the `Annotated` type of a key that takes a path: `~`, `$VAR` and `${VAR}` are expanded."""


def expand_path(text: str) -> str:
    """Expand `$VAR` and `${VAR}`, then `~` or `~user` at the start.

    `$` before anything but a letter, `_` or `{` is kept. Raises ValueError, with a message for the user without the
    key.
    """

    def value(match: re.Match[str]) -> str:
        name = match[2] if match[1] is None else match[1]
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"found {match[0]} in `{text}`. Only $NAME and ${{NAME}} are expanded")
        if not os.environ.get(name):
            state = "empty" if name in os.environ else "not set"
            raise ValueError(f"the environment variable {name} in `{text}` is {state}. Set it, or write the path out")
        return os.environ[name]

    substituted = _VARIABLE.sub(value, text)
    path = os.path.expanduser(substituted)
    if substituted.startswith("~") and path == substituted:
        user = substituted[1:].partition("/")[0]
        raise ValueError(
            f"`{text}`: there is no user {user}. For a file whose name starts with ~ write ./{substituted}"
        )
    return path


def parse_path(text: str) -> Path:
    """Parse and expand a path; the `type` of `Path` options."""
    return Path(parse_path_or_id(text))


def parse_path_or_id(text: str) -> str:
    """Expand the value of an option that takes a path or another word, such as an id on the hub."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def looks_like_hub_id(text: str) -> bool:
    """Return whether `text` may be an id on the Hugging Face hub: `owner/name`, or `name`.

    Everything else is a path, for which the hub is never asked: a text that starts with `.`, `/`, `~` or `$`, contains
    more than one `/` or a character that ids don't have, has the suffix of a file, or starts with an existing folder.
    """
    if text.lower().endswith(_FILE_ENDINGS) or not _HUB_ID.fullmatch(text):
        return False
    owner, slash, _ = text.partition("/")
    return not (slash and Path(owner).is_dir())


def describe_missing_path(path: Path) -> str:
    """Return a sentence that names the first missing part of `path`, and existing paths of a similar name."""
    missing = next(part for part in [*reversed(path.parents), path] if not part.exists())
    return f"there is no {missing.name} in {missing.parent.absolute()}.{suggest_similar(path)}"


def suggest_similar(path: Path) -> str:
    """Return a question that names up to two existing paths of a similar name; empty if there is none."""
    missing = next((part for part in [*reversed(path.parents), path] if not part.exists()), path)
    folder, rest = missing.parent, path.relative_to(missing)
    names = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    matches = [folder / name for name in difflib.get_close_matches(missing.name, names, n=2, cutoff=0.7)]
    complete = [match / rest for match in matches if (match / rest).exists()]
    return f" Did you mean {' or '.join(map(str, complete or matches))}?" if matches else ""


def hub_unreachable_reason(hub_id: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why `hub_id` is unavailable: not in the cache, and the hub is unreachable. None where it may be available.

    Takes milliseconds: no request is made, only the name of the hub's host is resolved.
    """
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    # datasets keeps prepared data in another folder than downloads.
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    folders = [hub / f"{kind}s--{hub_id.replace('/', '--')}"]
    folders += [datasets / hub_id.replace("/", "___")] if kind == "dataset" else []
    if any(folder.exists() for folder in folders):
        return None
    if reason := hub_offline_reason():
        return f"it is not in the cache of the Hugging Face hub ({hub}), and the hub is unreachable: {reason}"
    return None


def hub_offline_reason() -> str | None:
    """Return why nothing can be downloaded from the Hugging Face hub; None where it may be reachable."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname or ""
    return None if _resolves(host) else f"{host} can't be resolved from this machine"


def _resolves(host: str) -> bool:
    """Return whether `host` can be resolved; true behind a proxy, which resolves it."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
