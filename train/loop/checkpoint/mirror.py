"""Mirror: copies of a run's complete checkpoints on another disk, made in the background."""

import errno
import os
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from train.loop.checkpoint.manifest import COMPLETE, list_complete_checkpoints, list_files, select_surplus
from train.storage.atomic_write import fsync

_SUFFIX = ".unfinished"


class Mirror:
    """Copies of checkpoints in `save.mirror_dir`, one after the other."""

    def __init__(self, folder: str | None, keep: int | None) -> None:
        """Begin without copies. `folder`: None = copy nothing. `keep`: number of copies to keep; None = all."""
        self._folder, self._keep = Path(folder) if folder else None, keep
        self._disk = disk_of(folder)
        self._copying: Future[None] | None = None
        self._copies = ThreadPoolExecutor(1, "mirror")

    def copy(self, checkpoint: Path, spared: Collection[str | None]) -> None:
        """Copy a checkpoint in the background. `spared`: names of copies to keep."""
        if self._folder is not None:
            self._copying = self._copies.submit(self._copy, checkpoint, self._folder, spared)

    def close(self) -> None:
        """Wait for the copy that is in progress, if any."""
        if self._copying is not None and not self._copying.done():
            print(f"copying the last checkpoint to {self._folder}", flush=True)
        self._copies.shutdown(wait=True)

    def _copy(self, checkpoint: Path, mirror: Path, spared: Collection[str | None]) -> None:
        staging_dir = mirror / f"{checkpoint.name}{_SUFFIX}"
        try:
            for left_over in mirror.glob(f"checkpoint-*{_SUFFIX}"):
                shutil.rmtree(left_over, ignore_errors=True)
            staging_dir.mkdir(parents=True)
            self._disk = self._disk or disk_of(mirror)
            if disk_of(mirror) != self._disk:
                raise OSError(errno.ENOENT, "its disk is gone")
            for name in [*list_files(checkpoint), COMPLETE]:
                (staging_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, staging_dir / name)
                fsync(staging_dir / name)
            shutil.rmtree(mirror / checkpoint.name, ignore_errors=True)
            staging_dir.rename(mirror / checkpoint.name)
            fsync(mirror)
            for path in select_surplus(list_complete_checkpoints(mirror), self._keep, spared):
                path.rename(staging_dir)
                shutil.rmtree(staging_dir, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(staging_dir, ignore_errors=True)
            if checkpoint.is_dir():  # else it was deleted meanwhile, and a newer one follows
                print(f"warning: save.mirror_dir: {checkpoint.name} was not copied to {mirror}: {error}", flush=True)


def disk_of(folder: Path | str | None) -> int | None:
    """Return the device number of a folder; None if there is no such folder."""
    return os.stat(folder).st_dev if folder and Path(folder).is_dir() else None
