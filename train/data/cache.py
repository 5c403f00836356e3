"""Folders that are made once and kept: written aside, renamed when whole, verified when opened, made by one process.

An entry is a folder named by its key, with a manifest that holds size and checksum (xxh3, 128 bits) of each of its
files. A process that is killed leaves a folder of another name, which the next one removes. Processes that want the
same entry at once wait for the one that makes it at a file lock, never in a collective, so no watchdog of a process
group can kill them (LLaMA-Factory#2424, axolotl#2684). Where a file system has no locks two may make it; one is kept.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from train.errors import UserError
from train.progress import ProgressBar
from train.ranks import is_first_rank
from train.storage.atomic_write import fsync
from train.storage.checksum import hash_files

_MANIFEST = "manifest.json"
_PROGRESS = "progress"
_SECONDS_BETWEEN_LOOKS = 0.2

Build = Callable[[Path], Mapping[str, Any]]
"""Writes an entry's files into the folder and gives what its manifest is to say of them, as JSON has it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry. `facts`: what was said of it when it was made. `hit`: it was there already."""

    folder: Path
    key: str
    facts: Mapping[str, Any]
    hit: bool


def default_folder() -> Path:
    """janus-sft within the folder where Hugging Face's libraries keep what they downloaded (HF_HOME)."""
    return Path(HF_HOME) / "janus-sft"


def cache_key(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that follow from all that JSON shows of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def find(folder: Path, key: str) -> Entry | None:
    """The entry, if it is there and whole."""
    facts = _read(folder / key)
    return None if facts is None else Entry(folder / key, key, facts, hit=True)


def get_or_build(folder: Path, key: str, build: Build, waiting: ProgressBar | None = None) -> Entry:
    """The entry of that key; made by `build` where it isn't there, or is broken.

    `waiting` shows how far another process is that makes it. Raises UserError where the folder can't be written;
    whatever `build` raises leaves nothing behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        if not is_first_rank():
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # the first rank shows its progress to the user: let it be the one
        while True:
            entry = find(folder, key)
            if entry is not None:
                return entry
            try:
                with lock.acquire(timeout=_SECONDS_BETWEEN_LOOKS):
                    return find(folder, key) or _make(folder, key, build)
            except Timeout:
                if waiting is not None:
                    waiting.advance(max(0, _progress(folder, key) - waiting.done))
    except OSError as fault:
        raise UserError(
            f"data.cache_dir: {folder} can't be written: {fault.strerror or fault}. Name another folder, with room for "
            "about 4.5 bytes a token."
        ) from fault


def report_progress(folder: Path, done: int) -> None:
    """Tell those who wait for the entry that is being written into `folder` how far it is."""
    (folder / _PROGRESS).write_text(str(done), "utf-8")


def _progress(folder: Path, key: str) -> int:
    for path in folder.glob(f"{key}.*.partial/{_PROGRESS}"):
        with suppress(OSError, ValueError):
            return int(path.read_text("utf-8"))
    return 0


def _make(folder: Path, key: str, build: Build) -> Entry:
    for left_over in [folder / key, *folder.glob(f"{key}.*.partial")]:  # nobody else makes this key: we hold its lock
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)
    partial = folder / f"{key}.{socket.gethostname()}-{os.getpid()}.partial"
    partial.mkdir()
    try:
        facts = build(partial)
        (partial / _PROGRESS).unlink(missing_ok=True)
        files = {path.name: _described(path) for path in sorted(partial.iterdir())}
        manifest = partial / _MANIFEST
        described = {"files": files, "facts": facts, "digest": cache_key(facts)}
        manifest.write_text(json.dumps(described, indent=1, ensure_ascii=False), "utf-8")
        for path in (*partial.iterdir(), partial):
            fsync(path)
        with suppress(OSError):  # where locks don't hold, another may have been first: then its entry is as good
            partial.rename(folder / key)
            fsync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    made = _read(folder / key)
    if made is None:
        raise OSError(f"{folder / key} was written and can't be read back")
    return Entry(folder / key, key, made, hit=False)


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3_128": hash_files([path])}


def _read(folder: Path) -> Mapping[str, Any] | None:
    """What the manifest says, if every file is as it was when it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        whole = all(_described(folder / name) == described for name, described in manifest["files"].items())
        return manifest["facts"] if whole and manifest["digest"] == cache_key(manifest["facts"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
