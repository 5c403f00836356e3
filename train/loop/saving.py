"""How a checkpoint is written so that a run can't be lost: aside, verified, on the disk, and only then under its name.

At any moment the newest checkpoint that has its name is whole; an older one goes only after a newer one has come. What
goes wrong on one process is known to all before any goes on (nanochat#336 and torchtitan's PR 4197: half checkpoints).
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError

from train.errors import UserError
from train.loop.checkpoint import COMPLETE, described, digest_of, files_below, folders
from train.progress import is_first_rank
from train.recipe import SaveSection

_ASIDE = "unfinished"
_SUFFIX = ".unfinished"


class Saver:
    """Writes the checkpoints of one run. All processes must call what it offers."""

    def __init__(self, output_dir: str, settings: SaveSection, keep: int | None) -> None:
        """`keep`: whole checkpoints that stay, at least 1; None = all."""
        self._folder, self._settings, self._keep = Path(output_dir), settings, keep
        self._ranks = PartialState()
        self._copying: Future[None] | None = None
        self._copies = ThreadPoolExecutor(1, "mirror")
        self.aside = self._folder / _ASIDE
        """Where a checkpoint is until it is whole."""

    def save(
        self,
        step: int,
        write: Callable[[], None],
        check: Callable[[Path], None],
        manifest: Callable[[], Mapping[str, Any]],
        best: str | None,
    ) -> bool:
        """Have `write` put checkpoint-`step` into `aside`, and make it one. Whether that went well.

        `check`: raises UserError where the folder doesn't hold what it should. `manifest`: what COMPLETE.json says
        besides the files. `best`: a checkpoint's name that is kept.
        Raises UserError, on all processes, where it can't be written and `save.on_error` is not `warn`.
        """
        name = f"checkpoint-{step}"
        unfinished = self.aside / name
        fault = self.first_fault(self._room)
        fault = fault or self.first_fault(lambda: self._clear(unfinished))
        fault = fault or self.first_fault(write)
        fault = fault or self.first_fault(lambda: check(unfinished))
        files: dict[str, Any] = {}
        fault = fault or self.first_fault(lambda: files.update(self._settled(unfinished)))
        if not fault:
            everyone: dict[str, Any] = {}
            for part in gather_object([files]):
                everyone |= part
            fault = self.first_fault(lambda: self._finish(unfinished, {**manifest(), "files": everyone}))
        if not fault:
            if is_first_rank():
                self._forget_older(name, best)
                self._mirror(self._folder / name)
            return True
        if is_first_rank():
            shutil.rmtree(self.aside, ignore_errors=True)
        newest = next((path.name for path in folders(self._folder) if (path / COMPLETE).is_file()), None)
        untouched = f"{newest} is untouched." if newest else "There is none before it."
        message = f"output_dir: {self._folder / name} couldn't be written: {fault}. {untouched}"
        if self._settings.on_error == "error":
            raise UserError(
                f"{message} Make room or mend the disk, then start again: the run goes on from there. "
                "Training goes on after such a fault where save.on_error is `warn`."
            )
        if is_first_rank():
            print(f"warning: {message} Training goes on (save.on_error: warn).", flush=True)
        return False

    def close(self) -> None:
        """Wait for the copy that is under way, if any."""
        if self._copying is not None and not self._copying.done():
            print(f"copying the last checkpoint to {self._settings.mirror_dir}", flush=True)
        self._copies.shutdown(wait=True)

    def first_fault(self, act: Callable[[], Any]) -> str | None:
        """What went wrong as each process did `act`; None if nothing did on any."""
        fault = None
        try:
            act()
        except OSError as found:
            fault = found.strerror or str(found)
        except (UserError, SafetensorError, RuntimeError) as found:  # PyTorch's and safetensors' own of a full disk
            fault = " ".join(str(found).split())[:500]
        faults = [one for one in gather_object([fault]) if one]
        return faults[0].rstrip(".") if faults else None

    def _room(self) -> None:
        """Raise OSError where the disk can't hold what the last checkpoint took: before anything waits for a writer."""
        if not is_first_rank():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        newest = next((path for path in folders(self._folder) if (path / COMPLETE).is_file()), None)
        if newest is None:
            return
        needed = sum(one["bytes"] for one in json.loads((newest / COMPLETE).read_text("utf-8"))["files"].values())
        free = shutil.disk_usage(self._folder).free + sum(path.stat().st_size for path in _files(self.aside))
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{free / 2**30:,.2f} GiB are free, and the last checkpoint took {needed / 2**30:,.2f}",
            )

    def _clear(self, unfinished: Path) -> None:
        """Begin with an empty folder, whatever an earlier attempt left."""
        if is_first_rank():
            if self.aside.exists():
                shutil.rmtree(self.aside)
            unfinished.mkdir(parents=True)

    def _settled(self, unfinished: Path) -> dict[str, Any]:
        """Bring this process's share of the files onto the disk; their sizes and checksums."""
        found = {}
        for name in list(files_below(unfinished))[self._ranks.process_index :: self._ranks.num_processes]:
            _sync(unfinished / name)
            found[name] = described(unfinished / name)
            if found[name] is None:
                raise OSError(errno.EIO, f"{name} was written and can't be read back")
        return found

    def _finish(self, unfinished: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest and give the checkpoint its name."""
        if not is_first_rank():
            return
        manifest["digest"] = digest_of(manifest)
        complete = unfinished / COMPLETE
        complete.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        for path in (complete, *(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            _sync(path)
        named = self._folder / unfinished.name
        if named.exists():  # of an earlier attempt, or of a run that this one started anew
            shutil.rmtree(named)
        unfinished.rename(named)
        _sync(self._folder)
        with suppress(OSError):
            self.aside.rmdir()

    def _forget_older(self, newest: str, best: str | None) -> None:
        """Delete whole checkpoints beyond those that stay. They don't count as whole from the first moment on."""
        if self._keep is None:
            return
        whole = [path for path in folders(self._folder) if (path / COMPLETE).is_file()]
        # the best one is among those that stay, and so is the newest: at least two where they differ
        spared = {newest, best} & {path.name for path in whole}
        others = [path for path in whole if path.name not in spared]
        for path in others[max(self._keep - len(spared), 0) :]:
            with suppress(OSError):
                (path / COMPLETE).unlink()
                shutil.rmtree(path)

    def _mirror(self, folder: Path) -> None:
        """Copy a checkpoint in the background."""
        if self._settings.mirror_dir is not None:
            self._copying = self._copies.submit(self._copy, folder, Path(self._settings.mirror_dir))

    def _copy(self, folder: Path, mirror: Path) -> None:
        aside = mirror / f"{folder.name}{_SUFFIX}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for name in [*files_below(folder), COMPLETE]:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, aside / name)
                _sync(aside / name)
            shutil.rmtree(mirror / folder.name, ignore_errors=True)
            aside.rename(mirror / folder.name)
            _sync(mirror)
        except OSError as fault:  # also where the original was deleted meanwhile: a newer one follows then
            shutil.rmtree(aside, ignore_errors=True)
            print(f"warning: save.mirror_dir: {folder.name} was not copied to {mirror}: {fault}", flush=True)
            return
        if self._keep is not None:
            for path in folders(mirror)[self._keep :]:
                shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
