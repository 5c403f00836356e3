"""Cache of tokens, packing plans and system-gain rows: built once, verified when opened, shared by all processes.

An entry is a folder named by its key. It is written under another name and renamed when complete; its manifest holds
the size and the checksum (xxh3, 128 bits) of each file. A process that is killed leaves a partial folder, which the
next builder removes. Processes that need the same entry at once wait at a file lock for the one that builds it, never
in a collective, so no watchdog of a process group can kill them (LLaMA-Factory#2424, axolotl#2684). On a file system
without locks two processes may build it; one result is kept.
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
_POLL_SECONDS = 0.2

VERSION = 1
"""The version of everything that is cached, part of every key.

Raise it by one whenever the same input would give other tokens, labels, packing plans or system-gain rows.
tests/data/test_cache_version.py fails when those of a fixed sample change and VERSION does not.
"""

Build = Callable[[Path], Mapping[str, Any]]
"""Writes an entry's files into a folder and returns its facts: values that JSON can hold, kept in the manifest."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete entry. `facts`: what its builder returned. `hit`: the entry was in the cache already."""

    folder: Path
    key: str
    facts: Mapping[str, Any]
    hit: bool


def default_folder() -> Path:
    """Return the cache folder of a recipe without `data.cache_dir`: janus-sft in Hugging Face's HF_HOME."""
    return Path(HF_HOME) / "janus-sft"


def cache_key(fingerprint: Mapping[str, Any]) -> str:
    """Return the key of an entry: 32 hexadecimal digits from VERSION and all that decides its content."""
    return _digest({"version": VERSION, **fingerprint})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def find(folder: Path, key: str) -> Entry | None:
    """Return the entry of `key`, or None if it is missing or damaged."""
    facts = _read_facts(folder / key)
    return None if facts is None else Entry(folder / key, key, facts, hit=True)


def get_or_build(folder: Path, key: str, build: Build, progress: ProgressBar | None = None) -> Entry:
    """Return the entry of `key`; if it is missing or damaged, let `build` write it.

    While another process builds it, `progress` shows how far that process is. An exception of `build` leaves nothing
    behind. Raises UserError if the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        if not is_first_rank():
            time.sleep(_POLL_SECONDS)  # the first rank shows its progress to the user: let it build
        while True:
            entry = find(folder, key)
            if entry is not None:
                return entry
            try:
                with lock.acquire(timeout=_POLL_SECONDS):
                    return find(folder, key) or _build(folder, key, build)
            except Timeout:
                if progress is not None:
                    progress.advance(max(0, _read_progress(folder, key) - progress.done))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder} can't be written: {error.strerror or error}. Name another folder, with room for "
            "about 4.5 bytes a token."
        ) from error


def report_progress(folder: Path, done: int) -> None:
    """Publish the progress of the entry that is being built in `folder` to the processes that wait for it."""
    (folder / _PROGRESS).write_text(str(done), "utf-8")


def _read_progress(folder: Path, key: str) -> int:
    for path in folder.glob(f"{key}.*.partial/{_PROGRESS}"):
        with suppress(OSError, ValueError):
            return int(path.read_text("utf-8"))
    return 0


def _build(folder: Path, key: str, build: Build) -> Entry:
    """Build an entry in a partial folder and rename it. The caller holds the lock of `key`."""
    for leftover in [folder / key, *folder.glob(f"{key}.*.partial")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    partial = folder / f"{key}.{socket.gethostname()}-{os.getpid()}.partial"
    partial.mkdir()
    try:
        facts = build(partial)
        (partial / _PROGRESS).unlink(missing_ok=True)
        files = {path.name: _describe_file(path) for path in sorted(partial.iterdir())}
        manifest = {"files": files, "facts": facts, "digest": _digest(facts)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), "utf-8")
        for path in (*partial.iterdir(), partial):
            fsync(path)
        with suppress(OSError):  # without working locks another process may have been first: its entry is as good
            partial.rename(folder / key)
            fsync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    written_facts = _read_facts(folder / key)
    if written_facts is None:
        raise OSError(f"{folder / key} was written and can't be read back")
    return Entry(folder / key, key, written_facts, hit=False)


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3_128": hash_files([path])}


def _read_facts(folder: Path) -> Mapping[str, Any] | None:
    """Return the facts in the manifest, or None unless every file has the size and checksum it was written with."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        intact = all(_describe_file(folder / name) == written for name, written in manifest["files"].items())
        return manifest["facts"] if intact and manifest["digest"] == _digest(manifest["facts"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
