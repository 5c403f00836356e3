"""Which checkpoint a run goes on from: one that is whole, and whose run was this one.

A checkpoint is a folder with COMPLETE.json, its manifest, which is written last: what the run was, how far it had come,
and size and checksum of each file. What a run is told of a checkpoint that it passes over, or of a difference between
then and now, is said by name: nothing starts from zero in silence (transformers#35782; ms-swift#10050).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.progress import progress_bar
from train.storage.checksum import digest_of_files

COMPLETE = "COMPLETE.json"
UNSHARDED = "one process or DDP"
"""What a manifest calls the distribution where each process holds the whole optimizer."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `manifest`: what its COMPLETE.json says."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that lie behind it."""
        return int(self.manifest["step"])


def folders(*parents: str | Path | None) -> list[Path]:
    """The checkpoints in these folders, whole or not, the newest first."""
    found = [path for parent in parents if parent for path in Path(parent).glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where the folder isn't named like one."""
    number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(number[1]) if number else -1


def _opened(folder: Path) -> Checkpoint | str:
    """The checkpoint, if every file is there as it was written; else what is wrong with it, as a sentence."""
    try:
        manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        if manifest["digest"] != digest_of(manifest):
            return f"{folder / COMPLETE} is damaged."
        files, step = manifest["files"], manifest["step"]
    except FileNotFoundError:
        there = "was not written to the end: it has no" if folder.is_dir() else "is not there, or is no checkpoint: no"
        return f"{folder} {there} {COMPLETE}."
    except (OSError, ValueError, KeyError, TypeError) as fault:
        return f"{folder / COMPLETE} is damaged ({fault or type(fault).__name__})."
    if step_of(folder) not in (-1, step):
        return f"{folder} holds step {step}: rename it to checkpoint-{step}."
    with progress_bar(f"checking {folder.name}", total=len(files), unit="files") as checking:
        for name, written in files.items():
            if described(folder / name, known=written) != written:
                what = "is damaged" if (folder / name).is_file() else "is missing"
                return f"{folder / name} {what}."
            checking.advance()
    return Checkpoint(folder, manifest)


def checkpoint_in(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files are not looked at. Raises UserError where it has no whole manifest."""
    manifest = manifest_of(folder)
    if manifest is None:
        raise UserError(f"--resume: {folder} is no whole checkpoint: its {COMPLETE} is missing or damaged.")
    return Checkpoint(folder, manifest)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What COMPLETE.json says; None where it isn't there or isn't whole. The files are not looked at."""
    try:
        manifest: dict[str, Any] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return manifest if manifest["digest"] == digest_of(manifest) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def written(manifest: Mapping[str, Any]) -> str:
    """A manifest as COMPLETE.json has it, with its digest."""
    return json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1, sort_keys=True)


def described(path: Path, *, known: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Size and checksum of a file, as the manifest has them; None where it can't be read or isn't of `known`'s size."""
    try:
        size = path.stat().st_size
        if known is not None and known.get("bytes") != size:
            return None
        return {"bytes": size, "xxh3_128": digest_of_files([path])}
    except (OSError, UserError):
        return None


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but for its own digest."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files below `folder`, relative to it, in one order everywhere; COMPLETE.json aside."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            yield path.relative_to(folder).as_posix()
