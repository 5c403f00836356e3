"""How a checkpoint is written so that a run can't be lost: aside, verified, on the disk, and only then under its name.

At any moment the newest checkpoint that has its name is whole; an older one goes only after a newer one has come. What
goes wrong on one process is known to all before any goes on (nanochat#336 and torchtitan's PR 4197: half checkpoints).
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
    described,
    files_below,
    folders,
    manifest_of,
    step_of,
    written,
)
from train.loop.output_dir import ASIDE
from train.ranks import is_first_rank
from train.recipe import SaveSection
from train.storage.atomic_write import fsync

_SUFFIX = ".unfinished"
_SET_ASIDE = "set-aside"
_RESOLVED = "recipe.yaml"
"""What every run leaves in its folder as it begins."""
_SMALL_FILES = 2**19
"""Bytes, and more than all files take that hold no weights and no states."""


class Saver:
    """Writes the checkpoints of one run. All processes must call what it offers."""

    def __init__(self, output_dir: str, settings: SaveSection, keep: int | None) -> None:
        """`keep`: whole checkpoints that stay, at least 1; None = all."""
        self._folder, self._settings, self._keep = Path(output_dir), settings, keep
        self._ranks = PartialState()
        self._copying: Future[None] | None = None
        self._copies = ThreadPoolExecutor(1, "mirror")
        self._disk, self._mirror_disk = _disk_of(self._folder), _disk_of(settings.mirror_dir)
        self.aside = self._folder / ASIDE
        """Where a checkpoint is until it is whole."""

    def begin(self, going_on: Checkpoint | None) -> None:
        """Set aside what would mix with the run that begins now: checkpoints of its own future, or of another run.

        `going_on`: the checkpoint that it goes on from; None = it starts anew. They are moved, not deleted: into
        `set-aside-N` in the same folder, where nothing looks for checkpoints. Raises UserError, on all processes, where
        they go on from different ones (a disk that they don't share), or where a folder can't be moved.
        """
        chosen = {str(one) for one in gather_object([going_on and going_on.manifest["digest"]])}
        if len(chosen) > 1:
            raise UserError(
                "--resume auto: the processes found different checkpoints, so output_dir and save.mirror_dir are not "
                "the same folders on all nodes, or have changed just now. Name one: --resume DIR."
            )
        fault = self.first_error_on_any_rank(lambda: self._set_aside(going_on))
        if fault:
            raise UserError(f"output_dir: older checkpoints couldn't be moved aside: {fault}. Name another folder.")

    def _set_aside(self, going_on: Checkpoint | None) -> None:
        if not is_first_rank():
            return
        parents = [self._folder, *(Path(folder) for folder in [self._settings.mirror_dir] if folder)]
        for parent in parents:
            others = [path for path in folders(parent) if not _belongs(path, going_on, mirrored=parent != self._folder)]
            if not others:
                continue
            numbers = [int(path.name.rpartition("-")[2]) for path in parent.glob(f"{_SET_ASIDE}-[0-9]*")]
            into = parent / f"{_SET_ASIDE}-{max(numbers, default=0) + 1}"
            into.mkdir()
            for path in reversed(others):
                path.rename(into / path.name)
            names = ", ".join(path.name for path in reversed(others))
            after = f"goes on from step {going_on.step}" if going_on else "starts anew"
            print(f"moved to {into}, as this run {after}: {names}. Delete them when you like.", flush=True)

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
        """Have `write` put checkpoint-`step` into `aside`, and make it one. Whether that went well.

        `check`: raises UserError where the folder doesn't hold what it should. `manifest`: what COMPLETE.json says
        besides the files. `best`: a checkpoint's name that is kept. `stopping`: whether the run ends with it.
        Raises UserError, on all processes, where it can't be written and `save.on_error` is not `warn`.
        """
        name = f"checkpoint-{step}"
        unfinished = self.aside / name
        fault = self.first_error_on_any_rank(self._room)
        fault = fault or self.first_error_on_any_rank(lambda: self._clear(unfinished))
        fault = fault or self.first_error_on_any_rank(write)
        fault = fault or self.first_error_on_any_rank(lambda: check(unfinished))
        files: dict[str, Any] = {}
        if not fault:
            # over a network each node may see files of the others late: one list for all, or one would be left out
            names = sorted({name for part in gather_object([list(files_below(unfinished))]) for name in part})
            fault = self.first_error_on_any_rank(lambda: files.update(self._settled(unfinished, names)))
        if not fault:
            everyone: dict[str, Any] = {}
            for part in gather_object([files]):
                everyone |= part
            fault = self.first_error_on_any_rank(lambda: self._finish(unfinished, {**manifest(), "files": everyone}))
        if not fault:
            if is_first_rank():
                self._forget_older(name, best)
                self._mirror(self._folder / name, {name, best})
            return True
        if is_first_rank():
            shutil.rmtree(self.aside, ignore_errors=True)
        newest = next(iter(_whole(self._folder)), None)
        untouched = f"{newest.name} is untouched." if newest else "No whole one is there before it."
        message = f"output_dir: {self._folder / name} couldn't be written: {fault}. {untouched}"
        if self._settings.on_error == "error":
            raise UserError(
                f"{message} {self.how_to_go_on()} Training goes on after such a fault where save.on_error is `warn`."
            )
        if is_first_rank():
            then = "The run stops without it" if stopping else "Training goes on"
            print(f"warning: {message} {then} (save.on_error: warn).", flush=True)
        return False

    def how_to_go_on(self) -> str:
        """What to do about a disk, and what the next start begins with."""
        then = "goes on from its newest checkpoint" if _whole(self._folder) else "starts anew, as it has no checkpoint"
        return f"Make room or mend the disk, then start again: the run {then}."

    def close(self) -> None:
        """Wait for the copy that is under way, if any."""
        if self._copying is not None and not self._copying.done():
            print(f"copying the last checkpoint to {self._settings.mirror_dir}", flush=True)
        self._copies.shutdown(wait=True)

    def first_error_on_any_rank(self, act: Callable[[], Any]) -> str | None:
        """What went wrong as each process did `act`; None if nothing did on any."""
        fault = None
        try:
            act()
        except OSError as found:
            fault = found.strerror or str(found)
        except (UserError, SafetensorError, RuntimeError) as found:  # PyTorch's and safetensors' own of a full disk
            full = self._full() and not isinstance(found, UserError)
            fault = os.strerror(errno.ENOSPC) if full else " ".join(str(found).split())[:500]
        except Exception as found:
            rust = re.search(r"\(os error (\d+)\)", str(found))
            if type(found) is not Exception or rust is None:
                raise
            fault = os.strerror(int(rust[1]))  # the tokenizers', which knows no OSError
        faults = [one for one in gather_object([fault]) if one]
        return faults[0].rstrip(".") if faults else None

    def raise_on_all_ranks(self, act: Callable[[], Any]) -> None:
        """Have each process do `act`; where it fails on one, raise OSError on all, before they wait for each other.

        A process that failed alone would leave the others in a collective that it never comes to.
        """
        fault = self.first_error_on_any_rank(act)
        if fault:
            raise OSError(errno.EIO, fault)

    def _full(self) -> bool:
        """Whether the disk is all but full; PyTorch says something else of it ("unexpected pos 675328 vs 675216")."""
        try:
            return shutil.disk_usage(self._folder).free < _SMALL_FILES
        except OSError:
            return False

    def _check_folder(self) -> None:
        """Raise OSError where output_dir isn't what it was: below a mount that vanishes, another folder shows."""
        disk = _disk_of(self._folder)
        if (disk is None or disk != self._disk) and not (self._folder / _RESOLVED).is_file():
            raise OSError(errno.ENOENT, "the folder in which the run began is gone, or the disk that it was on")

    def _room(self) -> None:
        """Raise OSError where the folder is gone, or its disk can't hold what the last checkpoint took."""
        if not is_first_rank():
            return
        self._check_folder()
        newest = next((found for path in _whole(self._folder) if (found := manifest_of(path))), None)
        if newest is None:
            return
        needed = sum(one["bytes"] for one in newest["files"].values())
        free = shutil.disk_usage(self._folder).free + sum(path.stat().st_size for path in _files(self.aside))
        if free < needed:
            raise OSError(errno.ENOSPC, f"{_size(free)} are free, and the last one took {_size(needed)}")

    def check_room_for_small_files(self) -> None:
        """Raise OSError where the disk is all but full: then nothing more is begun that processes wait for."""
        if is_first_rank() and self._full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _clear(self, unfinished: Path) -> None:
        """Begin with an empty folder, whatever an earlier attempt left."""
        if is_first_rank():
            if self.aside.exists():
                shutil.rmtree(self.aside)
            self.aside.mkdir()
            unfinished.mkdir()

    def _settled(self, unfinished: Path, names: list[str]) -> dict[str, Any]:
        """Bring this process's share of the files onto the disk; their sizes and checksums."""
        found = {}
        for name in names[self._ranks.process_index :: self._ranks.num_processes]:
            fsync(unfinished / name)
            found[name] = described(unfinished / name)
            if found[name] is None:
                raise OSError(errno.EIO, f"{name} was written and can't be read back")
        return found

    def _finish(self, unfinished: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and give the checkpoint its name."""
        if not is_first_rank():
            return
        complete = unfinished / COMPLETE
        complete.write_text(written(manifest), encoding="utf-8")
        for path in (complete, *(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            fsync(path)
        self._check_folder()
        named = self._folder / unfinished.name
        if named.exists():  # written again as an evaluation was made good, say: half of it must never bear its name
            named.rename(self.aside / f"{named.name}.before")
        unfinished.rename(named)
        fsync(self._folder)
        shutil.rmtree(self.aside, ignore_errors=True)

    def _forget_older(self, newest: str, best: str | None) -> None:
        """Delete whole checkpoints beyond those that stay: under another name, so that no half one is ever met."""
        for path in _surplus(_whole(self._folder), self._keep, {newest, best}):
            with suppress(OSError):
                self.aside.mkdir(exist_ok=True)
                path.rename(self.aside / path.name)
        shutil.rmtree(self.aside, ignore_errors=True)

    def _mirror(self, folder: Path, spared: set[str | None]) -> None:
        """Copy a checkpoint in the background."""
        if self._settings.mirror_dir is not None:
            self._copying = self._copies.submit(self._copy, folder, Path(self._settings.mirror_dir), spared)

    def _copy(self, folder: Path, mirror: Path, spared: set[str | None]) -> None:
        aside = mirror / f"{folder.name}{_SUFFIX}"
        try:
            for left_over in mirror.glob(f"checkpoint-*{_SUFFIX}"):
                shutil.rmtree(left_over, ignore_errors=True)
            aside.mkdir(parents=True)
            self._mirror_disk = self._mirror_disk or _disk_of(mirror)
            if _disk_of(mirror) != self._mirror_disk:
                raise OSError(errno.ENOENT, "the disk that it was on is gone")
            for name in [*files_below(folder), COMPLETE]:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, aside / name)
                fsync(aside / name)
            shutil.rmtree(mirror / folder.name, ignore_errors=True)
            aside.rename(mirror / folder.name)
            fsync(mirror)
            for path in _surplus(_whole(mirror), self._keep, spared):
                path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
        except OSError as fault:
            shutil.rmtree(aside, ignore_errors=True)
            if folder.is_dir():  # else it was deleted meanwhile, and a newer one follows
                print(f"warning: save.mirror_dir: {folder.name} was not copied to {mirror}: {fault}", flush=True)


def _disk_of(folder: Path | str | None) -> int | None:
    """The disk that a folder lies on; None where there is no such folder."""
    return os.stat(folder).st_dev if folder and Path(folder).is_dir() else None


def _whole(parent: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, the newest first."""
    return [path for path in folders(parent) if (path / COMPLETE).is_file()]


def _surplus(whole: list[Path], keep: int | None, spared: Iterable[str | None]) -> list[Path]:
    """Those beyond the `keep` that stay. `spared`: names among them, so the best and the newest stay in any case."""
    if keep is None:
        return []
    kept = {path.name for path in whole} & set(spared)
    others = [path for path in whole if path.name not in kept]
    return others[max(keep - len(kept), 0) :]


def _belongs(path: Path, going_on: Checkpoint | None, *, mirrored: bool) -> bool:
    """Whether a checkpoint lies before the point from which the run goes on, or is that point."""
    if going_on is None or step_of(path) > going_on.step:
        return False
    if step_of(path) < going_on.step or path.samefile(going_on.folder):
        return True
    manifest = manifest_of(path) if mirrored else None
    return manifest is not None and manifest["digest"] == going_on.manifest["digest"]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
