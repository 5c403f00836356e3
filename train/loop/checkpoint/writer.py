"""Checkpoint writer: write to a staging folder, verify; sync to the disk and rename in the background.

Training waits while files are written to the staging folder, into the page cache of the host, and compared with the
model. A thread of each rank then syncs and hashes its share of them; that of the first rank renames the folder, deletes
older checkpoints and starts the copy in the mirror.

The newest named checkpoint is complete at any moment; an older one is deleted only after a newer one exists. All ranks
learn of an error on any rank before they write files (nanochat#336 and torchtitan's PR 4197: partial checkpoints) and,
of one in the background, in `finish`: at the latest before the next save.

PyTorch's own `torch.distributed.checkpoint.async_save` would write another format (`.distcp` shards and `.metadata`)
than transformers loads; it coordinates ranks by collectives of its thread, and DeepSpeed writes its own files anyway.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Event
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
    select_surplus,
)
from train.loop.checkpoint.mirror import Mirror, disk_of
from train.loop.checkpoint.rank_store import collect
from train.loop.output_dir import STAGING
from train.ranks import is_first_rank
from train.recipe import SaveSection
from train.storage.atomic_write import fsync
from train.storage.transfer_time import longest_transfer

_SET_ASIDE = "set-aside"
_RECIPE = "recipe.yaml"
"""File that every run writes to output_dir when it begins."""
_SMALL_FILES = 2**19
"""Bytes; more than all files without weights and optimizer states need."""
_SECONDS_AFTER_FAILURE = 30
"""Time that launchers leave the other ranks after one has failed."""


class CheckpointWriter:
    """Writes the checkpoints of one run. All processes must call its public methods."""

    def __init__(self, output_dir: str, settings: SaveSection, keep: int | None) -> None:
        """Begin without checkpoints. `keep`: number of complete checkpoints to keep, at least 1; None = all."""
        self._folder, self._settings, self._keep = Path(output_dir), settings, keep
        self._ranks = PartialState()
        self._mirror = Mirror(settings.mirror_dir, keep)
        self._disk = disk_of(self._folder)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._completing: Future[None] = Future()
        self._abandoned = Event()
        self.staging_dir = self._folder / STAGING
        """Folder of a checkpoint until it is complete."""
        self.step_under_way: int | None = None
        """Step of the save that is completed in the background, until `finish` has waited for it."""

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
        """Write the files of checkpoint-`step`. Return whether they were written.

        The background then completes the checkpoint. Call `finish` afterwards, at the latest before the next save.

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
        if error:
            return self._give_up(name, error, stopping)
        # on a network disk a node may see the others' files late: gather one list, so that none is left out
        names = sorted({name for part in gather_object([list(list_files(folder))]) for name in part})
        self._completing = self._background.submit(self._complete, folder, names, manifest(), best)
        self.step_under_way = step
        return True

    def wait(self) -> None:
        """Wait until this process has completed its part of the save that is under way: on the first rank all of it."""
        wait([self._completing])

    def finish(self, *, stopping: bool = False) -> bool:
        """Wait until the save that is under way is completed on all processes. Return whether there is a checkpoint.

        `stopping`: whether the run ends with it. Raises UserError, on all processes, as `save` does.
        """
        error = self.first_error_on_any_rank(self._completing.result)
        step, self.step_under_way = self.step_under_way, None
        return error is None or self._give_up(f"checkpoint-{step}", error, stopping)

    def _give_up(self, name: str, error: str, stopping: bool) -> bool:
        """Raise UserError or print a warning about a checkpoint that couldn't be written. Return False."""
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

    def abandon(self) -> None:
        """End the save that is under way soon, complete or not: after the file that is being read."""
        self._abandoned.set()

    def expect_lost_peers(self) -> None:
        """Abandon the save that is under way if it isn't completed soon: other processes may be gone."""
        if self.step_under_way is not None and self._ranks.num_processes > 1:
            wait([self._completing], _SECONDS_AFTER_FAILURE)
            self.abandon()

    def close(self) -> None:
        """Wait for the work in the background. Only after an error a save is under way here."""
        self._background.shutdown(wait=True)
        if self.step_under_way is not None and (error := self._completing.exception()) and is_first_rank():
            shutil.rmtree(self.staging_dir, ignore_errors=True)
            reason = self._describe(error) or repr(error)
            print(f"warning: output_dir: checkpoint-{self.step_under_way} was not completed: {reason}", flush=True)
        self._mirror.close()

    def first_error_on_any_rank(self, act: Callable[[], Any]) -> str | None:
        """Call `act` on each process. Return the first error of any of them; None if all succeeded."""
        message = None
        try:
            act()
        except Exception as error:
            message = self._describe(error)
            if message is None:
                raise
        messages = [text for text in gather_object([message]) if text]
        return messages[0].rstrip(".") if messages else None

    def _describe(self, error: BaseException) -> str | None:
        """Return the message of an error of the disk or of the user's; None for others."""
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, UserError | SafetensorError | RuntimeError):  # PyTorch's and safetensors' of a full disk
            full = self._is_full() and not isinstance(error, UserError)
            return os.strerror(errno.ENOSPC) if full else " ".join(str(error).split())[:500]
        rust = re.search(r"\(os error (\d+)\)", str(error))
        # tokenizers raises a bare Exception in place of OSError
        return os.strerror(int(rust[1])) if type(error) is Exception and rust else None

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
        disk = disk_of(self._folder)
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

    def _complete(self, folder: Path, names: list[str], manifest: Mapping[str, Any], best: str | None) -> None:
        """Sync the files of a checkpoint; on the first rank give it its name, delete older ones and copy it.

        Runs in the background, so it calls no collective. Raises on this rank its own errors, on the first one all.
        """
        failure: Exception | None = None
        part: dict[str, Any] = {"files": {}, "error": None}
        try:
            part["files"] = self._sync(folder, names)
        except Exception as error:
            failure, part["error"] = error, self._describe(error) or repr(error)
        parts: list[Any] | None = [part]
        if self._ranks.num_processes > 1:
            parts = collect(part, longest_transfer(_size_of(folder)), self._abandoned)
        if failure:
            raise failure
        if parts is None:
            return
        for part in parts:
            if part["error"]:
                raise OSError(errno.EIO, part["error"])
        files = {name: file for part in parts for name, file in part["files"].items()}
        self._publish(folder, {**manifest, "files": files})
        self._delete_older(folder.name, best)
        self._mirror.copy(self._folder / folder.name, {folder.name, best})

    def _sync(self, folder: Path, names: list[str]) -> dict[str, Any]:
        """Sync this process's share of the files to the disk. Return their sizes and checksums."""
        files = {}
        for name in names[self._ranks.process_index :: self._ranks.num_processes]:
            if self._abandoned.is_set():
                raise InterruptedError(errno.EINTR, "the run was stopped")
            fsync(folder / name)
            files[name] = describe_file(folder / name)
            if files[name] is None:
                raise OSError(errno.EIO, f"{name} was written and can't be read back")
        return files

    def _publish(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and rename the folder to its final name."""
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
        for path in select_surplus(list_complete_checkpoints(self._folder), self._keep, {newest, best}):
            with suppress(OSError):
                self.staging_dir.mkdir(exist_ok=True)
                path.rename(self.staging_dir / path.name)
        shutil.rmtree(self.staging_dir, ignore_errors=True)


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
