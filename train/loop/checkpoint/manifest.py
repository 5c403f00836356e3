"""Checkpoint folders and their manifest, COMPLETE.json.

A checkpoint is complete when it has a manifest, which is written last. It records the run's settings, its progress,
and the size and checksum of each file.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.progress import progress_bar
from train.storage.checksum import hash_files

COMPLETE = "COMPLETE.json"
UNSHARDED = "one process or DDP"
"""Value of `distribution` in a manifest where each process holds the complete optimizer."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `manifest`: the content of its COMPLETE.json."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Return the number of optimizer steps before the checkpoint."""
        return int(self.manifest["step"])


def list_checkpoints(*parents: str | Path | None) -> list[Path]:
    """Return the folders in `parents` that are named like checkpoints, complete or not, the newest first."""
    folders = [path for parent in parents if parent for path in Path(parent).glob("checkpoint-*")]
    return sorted((path for path in folders if parse_step(path) >= 0), key=parse_step, reverse=True)


def list_complete_checkpoints(*parents: str | Path | None) -> list[Path]:
    """Return the checkpoints in `parents` that have a manifest, the newest first."""
    return [path for path in list_checkpoints(*parents) if (path / COMPLETE).is_file()]


def select_surplus(checkpoints: list[Path], keep: int | None, spared: Iterable[str | None]) -> list[Path]:
    """Return the checkpoints beyond `keep`, of which those named in `spared` (the best and the newest) always stay.

    `checkpoints`: complete ones, the newest first. `keep`: None = all.
    """
    if keep is None:
        return []
    kept = {path.name for path in checkpoints} & set(spared)
    others = [path for path in checkpoints if path.name not in kept]
    return others[max(keep - len(kept), 0) :]


def parse_step(folder: Path) -> int:
    """Return the step in a checkpoint's name; -1 for a folder of another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def verify_checkpoint(folder: Path) -> Checkpoint | str:
    """Return the checkpoint if every file matches the manifest; else a sentence that says what is wrong."""
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, str):
        return checkpoint
    mismatch = find_mismatch(checkpoint, checkpoint.manifest["files"])
    return checkpoint if mismatch is None else describe_mismatch(checkpoint, mismatch)


def open_checkpoint(folder: Path) -> Checkpoint | str:
    """Return the checkpoint if its manifest is valid, without reading the files; else a sentence that says why not."""
    try:
        manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        if manifest["digest"] != compute_digest(manifest):
            return f"{folder / COMPLETE} is damaged."
        step, _ = manifest["step"], manifest["files"]
    except FileNotFoundError:
        problem = "is incomplete" if folder.is_dir() else "does not exist or is not a checkpoint"
        return f"{folder} {problem}: it has no {COMPLETE}."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / COMPLETE} is damaged ({error or type(error).__name__})."
    if parse_step(folder) not in (-1, step):
        return f"{folder} holds step {step}: rename it to checkpoint-{step}."
    return Checkpoint(folder, manifest)


def find_mismatch(checkpoint: Checkpoint, names: Collection[str]) -> str | None:
    """Return the first of these files that is missing or differs from the manifest; None if all match."""
    with progress_bar(f"checking {checkpoint.folder.name}", total=len(names), unit="files") as progress:
        for name in names:
            expected = checkpoint.manifest["files"][name]
            if describe_file(checkpoint.folder / name, expected=expected) != expected:
                return name
            progress.advance()
    return None


def describe_mismatch(checkpoint: Checkpoint, name: str) -> str:
    """Return a sentence about a file that `find_mismatch` returned."""
    path = checkpoint.folder / name
    return f"{path} is {'damaged' if path.is_file() else 'missing'}."


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder without reading its files. Raises UserError if it has no valid manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"--resume: {folder} is not a complete checkpoint: its {COMPLETE} is missing or damaged.")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the content of COMPLETE.json; None if it is missing or damaged. The other files are not read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return manifest if manifest["digest"] == compute_digest(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def format_manifest(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as the text of COMPLETE.json, with its digest."""
    return json.dumps({**manifest, "digest": compute_digest(manifest)}, indent=1, sort_keys=True)


def describe_file(path: Path, *, expected: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return size and checksum of a file; None if it can't be read or has another size than `expected`."""
    try:
        size = path.stat().st_size
        if expected is not None and expected.get("bytes") != size:
            return None
        return {"bytes": size, "xxh3_128": hash_files([path])}
    except (OSError, UserError):
        return None


def compute_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_files(folder: Path) -> Iterator[str]:
    """Yield the names of all files below `folder` but COMPLETE.json, relative to it, in the same order on all nodes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            yield path.relative_to(folder).as_posix()
