"""Checkpoint writer: write to a staging folder, verify, sync to the disk, then rename.

The newest named checkpoint is complete at any moment; an older one is deleted only after a newer one exists. All ranks
learn of an error on any rank before they continue (nanochat#336 and torchtitan's PR 4197: partial checkpoints).
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError

from train.errors import UserError
from train.loop.checkpoint.manifest import (
    COMPLETE,
    Checkpoint,
    describe_file,
    format_manifest,
    list_checkpoints,
    list_complete_checkpoints,
    list_files,
    parse_step,
    read_manifest,
)
from train.loop.output_dir import STAGING
from train.ranks import is_first_rank
from train.recipe import SaveSection
from train.storage.atomic_write import fsync

_SUFFIX = ".unfinished"
_SET_ASIDE = "set-aside"
_RECIPE = "recipe.yaml"
"""File that every run writes to output_dir when it begins."""
_SMALL_FILES = 2**19
"""Bytes; more than all files without weights and optimizer states need."""


class CheckpointWriter:
    """Writes the checkpoints of one run. All processes must call its public methods."""

    def __init__(self, output_dir: str, settings: SaveSection, keep: int | None) -> None:
        """Begin without checkpoints. `keep`: number of complete checkpoints to keep, at least 1; None = all."""
        self._folder, self._settings, self._keep = Path(output_dir), settings, keep
        self._ranks = PartialState()
        self._copying: Future[None] | None = None
        self._copies = ThreadPoolExecutor(1, "mirror")
        self._disk, self._mirror_disk = _disk_of(self._folder), _disk_of(settings.mirror_dir)
        self.staging_dir = self._folder / STAGING
        """Folder of a checkpoint until it is complete."""

    def begin(self, resume_from: Checkpoint | None) -> None:
        """Set aside the checkpoints that would mix with this run's: of its own future, or of another run.

        They are moved to `set-aside-N` in the same folder, where no run looks for checkpoints; nothing is deleted.
        `resume_from`: the checkpoint that the run resumes from; None = it starts from the beginning.
        Raises UserError, on all processes, if they resume from different checkpoints (a disk that they don't share),
        or if a folder can't be moved.
        """
        digests = {str(digest) for digest in gather_object([resume_from and resume_from.manifest["digest"]])}
        if len(digests) > 1:
            raise UserError(
                "--resume auto: the processes selected different checkpoints, so output_dir and save.mirror_dir are "
                "not the same folders on all nodes, or have just changed. Name one: --resume DIR."
            )
        error = self.first_error_on_any_rank(lambda: self._set_aside(resume_from))
        if error:
            raise UserError(f"output_dir: older checkpoints couldn't be moved: {error}. Name another folder.")

    def _set_aside(self, resume_from: Checkpoint | None) -> None:
        if not is_first_rank():
            return
        for parent in [self._folder, *(Path(folder) for folder in [self._settings.mirror_dir] if folder)]:
            mirrored = parent != self._folder
            others = [
                path for path in list_checkpoints(parent) if not _is_past_of(resume_from, path, mirrored=mirrored)
            ]
            if not others:
                continue
            numbers = [int(path.name.rpartition("-")[2]) for path in parent.glob(f"{_SET_ASIDE}-[0-9]*")]
            target = parent / f"{_SET_ASIDE}-{max(numbers, default=0) + 1}"
            target.mkdir()
            for path in reversed(others):
                path.rename(target / path.name)
            names = ", ".join(path.name for path in reversed(others))
            start = f"continues from step {resume_from.step}" if resume_from else "starts from the beginning"
            print(f"moved to {target}, as this run {start}: {names}. Delete them when you like.", flush=True)

    def save(
        self,
        step: int,
        write: Callable[[], None],
        check: Callable[[Path], None],
        manifest: Callable[[], Mapping[str, Any]],
        best: str | None,
        *,
        stopping: bool = False,
    ) -> bool:
        """Save checkpoint-`step`. Return whether it was written.

        Args:
            step: optimizer steps done.
            write: writes the checkpoint's folder into `staging_dir`.
            check: raises UserError if the folder is incomplete.
            manifest: returns the content of COMPLETE.json but for the files.
            best: name of a checkpoint to keep.
            stopping: whether the run ends with this checkpoint.

        Raises UserError, on all processes, if it can't be written and `save.on_error` is not `warn`.
        """
        name = f"checkpoint-{step}"
        folder = self.staging_dir / name
        error = self.first_error_on_any_rank(self._check_room)
        error = error or self.first_error_on_any_rank(lambda: self._clear(folder))
        error = error or self.first_error_on_any_rank(write)
        error = error or self.first_error_on_any_rank(lambda: check(folder))
        files: dict[str, Any] = {}
        if not error:
            # on a network disk a node may see the others' files late: gather one list, so that none is left out
            names = sorted({name for part in gather_object([list(list_files(folder))]) for name in part})
            error = self.first_error_on_any_rank(lambda: files.update(self._sync(folder, names)))
        if not error:
            all_files: dict[str, Any] = {}
            for part in gather_object([files]):
                all_files |= part
            error = self.first_error_on_any_rank(lambda: self._publish(folder, {**manifest(), "files": all_files}))
        if not error:
            if is_first_rank():
                self._delete_older(name, best)
                self._mirror(self._folder / name, {name, best})
            self._ranks.wait_for_everyone()
            return True
        if is_first_rank():
            shutil.rmtree(self.staging_dir, ignore_errors=True)
        newest = next(iter(list_complete_checkpoints(self._folder)), None)
        untouched = f"{newest.name} is untouched." if newest else "There is no earlier complete checkpoint."
        message = f"output_dir: {self._folder / name} couldn't be written: {error}. {untouched}"
        if self._settings.on_error == "error":
            raise UserError(
                f"{message} {self.next_start_hint()} Training continues after such an error if save.on_error is `warn`."
            )
        if is_first_rank():
            consequence = "The run stops without it" if stopping else "Training continues"
            print(f"warning: {message} {consequence} (save.on_error: warn).", flush=True)
        return False

    def next_start_hint(self) -> str:
        """Return what to do about a disk error, and where the next start begins."""
        start = (
            "continues from its newest checkpoint"
            if list_complete_checkpoints(self._folder)
            else "starts from the beginning, as it has no checkpoint"
        )
        return f"Free some space or repair the disk, then start again: the run {start}."

    def close(self) -> None:
        """Wait for the copy that is in progress, if any."""
        if self._copying is not None and not self._copying.done():
            print(f"copying the last checkpoint to {self._settings.mirror_dir}", flush=True)
        self._copies.shutdown(wait=True)

    def first_error_on_any_rank(self, act: Callable[[], Any]) -> str | None:
        """Call `act` on each process. Return the first error of any of them; None if all succeeded."""
        message = None
        try:
            act()
        except OSError as error:
            message = error.strerror or str(error)
        except (UserError, SafetensorError, RuntimeError) as error:  # PyTorch's and safetensors' own of a full disk
            full = self._is_full() and not isinstance(error, UserError)
            message = os.strerror(errno.ENOSPC) if full else " ".join(str(error).split())[:500]
        except Exception as error:
            rust = re.search(r"\(os error (\d+)\)", str(error))
            if type(error) is not Exception or rust is None:
                raise
            message = os.strerror(int(rust[1]))  # tokenizers raises a bare Exception in place of OSError
        messages = [text for text in gather_object([message]) if text]
        return messages[0].rstrip(".") if messages else None

    def raise_on_all_ranks(self, act: Callable[[], Any]) -> None:
        """Call `act` on each process. If it fails on one, raise OSError on all.

        A process that failed alone would leave the others waiting in a collective.
        """
        error = self.first_error_on_any_rank(act)
        if error:
            raise OSError(errno.EIO, error)

    def check_room_for_small_files(self) -> None:
        """Raise OSError if the disk is nearly full: nothing that processes wait for is begun then."""
        if is_first_rank() and self._is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_full(self) -> bool:
        """Return whether the disk is nearly full: PyTorch's errors don't say so ("unexpected pos 675328 vs 675216")."""
        try:
            return shutil.disk_usage(self._folder).free < _SMALL_FILES
        except OSError:
            return False

    def _check_folder(self) -> None:
        """Raise OSError if output_dir is another folder than at the start: below a lost mount, another one appears."""
        disk = _disk_of(self._folder)
        if (disk is None or disk != self._disk) and not (self._folder / _RECIPE).is_file():
            raise OSError(errno.ENOENT, "the folder in which the run began is gone, or its disk")

    def _check_room(self) -> None:
        """Raise OSError if the folder is gone, or its disk has less room than the last checkpoint needed."""
        if not is_first_rank():
            return
        self._check_folder()
        manifests = map(read_manifest, list_complete_checkpoints(self._folder))
        newest = next((manifest for manifest in manifests if manifest), None)
        if newest is None:
            return
        needed = sum(file["bytes"] for file in newest["files"].values())
        free = shutil.disk_usage(self._folder).free + _size_of(self.staging_dir)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{_format_size(free)} are free, the last one needed {_format_size(needed)}")

    def _clear(self, folder: Path) -> None:
        """Make `folder` empty, whatever an earlier attempt left."""
        if is_first_rank():
            if self.staging_dir.exists():
                shutil.rmtree(self.staging_dir)
            self.staging_dir.mkdir()
            folder.mkdir()

    def _sync(self, folder: Path, names: list[str]) -> dict[str, Any]:
        """Sync this process's share of the files to the disk. Return their sizes and checksums."""
        files = {}
        for name in names[self._ranks.process_index :: self._ranks.num_processes]:
            fsync(folder / name)
            files[name] = describe_file(folder / name)
            if files[name] is None:
                raise OSError(errno.EIO, f"{name} was written and can't be read back")
        return files

    def _publish(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and rename the folder to its final name."""
        if not is_first_rank():
            return
        complete = folder / COMPLETE
        complete.write_text(format_manifest(manifest), encoding="utf-8")
        for path in (complete, *(path for path in folder.rglob("*") if path.is_dir()), folder):
            fsync(path)
        self._check_folder()
        target = self._folder / folder.name
        if target.exists():  # written again, by a pending evaluation, say: no partial checkpoint may bear its name
            target.rename(self.staging_dir / f"{target.name}.before")
        folder.rename(target)
        fsync(self._folder)
        shutil.rmtree(self.staging_dir, ignore_errors=True)

    def _delete_older(self, newest: str, best: str | None) -> None:
        """Delete complete checkpoints beyond those to keep, after a rename: none is ever partial under its name."""
        for path in _select_surplus(list_complete_checkpoints(self._folder), self._keep, {newest, best}):
            with suppress(OSError):
                self.staging_dir.mkdir(exist_ok=True)
                path.rename(self.staging_dir / path.name)
        shutil.rmtree(self.staging_dir, ignore_errors=True)

    def _mirror(self, folder: Path, spared: set[str | None]) -> None:
        """Copy a checkpoint to save.mirror_dir in the background."""
        if self._settings.mirror_dir is not None:
            self._copying = self._copies.submit(self._copy, folder, Path(self._settings.mirror_dir), spared)

    def _copy(self, folder: Path, mirror: Path, spared: set[str | None]) -> None:
        staging_dir = mirror / f"{folder.name}{_SUFFIX}"
        try:
            for left_over in mirror.glob(f"checkpoint-*{_SUFFIX}"):
                shutil.rmtree(left_over, ignore_errors=True)
            staging_dir.mkdir(parents=True)
            self._mirror_disk = self._mirror_disk or _disk_of(mirror)
            if _disk_of(mirror) != self._mirror_disk:
                raise OSError(errno.ENOENT, "its disk is gone")
            for name in [*list_files(folder), COMPLETE]:
                (staging_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, staging_dir / name)
                fsync(staging_dir / name)
            shutil.rmtree(mirror / folder.name, ignore_errors=True)
            staging_dir.rename(mirror / folder.name)
            fsync(mirror)
            for path in _select_surplus(list_complete_checkpoints(mirror), self._keep, spared):
                path.rename(staging_dir)
                shutil.rmtree(staging_dir, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(staging_dir, ignore_errors=True)
            if folder.is_dir():  # else it was deleted meanwhile, and a newer one follows
                print(f"warning: save.mirror_dir: {folder.name} was not copied to {mirror}: {error}", flush=True)


def _disk_of(folder: Path | str | None) -> int | None:
    """Return the device number of a folder; None if there is no such folder."""
    return os.stat(folder).st_dev if folder and Path(folder).is_dir() else None


def _select_surplus(checkpoints: list[Path], keep: int | None, spared: Iterable[str | None]) -> list[Path]:
    """Return the checkpoints beyond `keep`, of which those named in `spared` (the best and the newest) always stay."""
    if keep is None:
        return []
    kept = {path.name for path in checkpoints} & set(spared)
    others = [path for path in checkpoints if path.name not in kept]
    return others[max(keep - len(kept), 0) :]


def _is_past_of(resume_from: Checkpoint | None, path: Path, *, mirrored: bool) -> bool:
    """Return whether a checkpoint lies before the one that the run resumes from, or is that one."""
    if resume_from is None or parse_step(path) > resume_from.step:
        return False
    if parse_step(path) < resume_from.step or path.samefile(resume_from.folder):
        return True
    manifest = read_manifest(path) if mirrored else None
    return manifest is not None and manifest["digest"] == resume_from.manifest["digest"]


def _size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 if there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _format_size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
