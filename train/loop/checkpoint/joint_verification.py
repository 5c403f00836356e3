"""Verification of checkpoints by all ranks of a launch: each reads its share of the files, all learn the result.

A checkpoint of a 7B has 101 GB and one of a 70B 988 GB; read by each of 8 ranks it would be 8 times as much. Ranks
exchange results through the launch's key-value store: at this point there is no process group, since the recipe that it
is made for may depend on the checkpoint.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.loop.checkpoint.manifest import (
    COMPLETE,
    Checkpoint,
    describe_mismatch,
    find_mismatch,
    open_checkpoint,
    verify_checkpoint,
)
from train.loop.checkpoint.rank_store import exchange
from train.storage.transfer_time import longest_transfer

Verify = Callable[[Sequence[Path]], Iterable[Checkpoint | str]]
"""Verifies folders in their order, each when it is asked for: the checkpoint, or a sentence that says what is wrong."""


def verify_alone(folders: Sequence[Path]) -> Iterator[Checkpoint | str]:
    """Verify checkpoints in this process."""
    return map(verify_checkpoint, folders)


def verify_jointly(folders: Sequence[Path]) -> Iterator[Checkpoint | str]:
    """Verify checkpoints together with all other ranks, which must call this and ask for the same results.

    Ranks that see the same folder (a shared disk) share its files; a copy on a node's own disk is read by the ranks of
    that node. All ranks return the same sentence about a damaged file, whoever finds it.
    Ranks that see different checkpoints verify theirs alone; CheckpointWriter.begin refuses to train on those.
    """
    opened = [open_checkpoint(folder) for folder in folders]
    rank = int(os.environ["RANK"])
    seen = exchange([_identify(checkpoint) for checkpoint in opened])
    if any(_digests(identities) != _digests(seen[0]) for identities in seen):
        yield from verify_alone(folders)
        return
    for number, checkpoint in enumerate(opened):
        if isinstance(checkpoint, str):
            yield checkpoint
            continue
        readers = [peer for peer, identities in enumerate(seen) if identities[number] == seen[rank][number]]
        files = checkpoint.manifest["files"]
        sizes = {name: file["bytes"] for name, file in files.items()}
        names = share_files(sizes, readers.index(rank), len(readers))
        mismatch = find_mismatch(checkpoint, names)
        result = None if mismatch is None else [list(files).index(mismatch), describe_mismatch(checkpoint, mismatch)]
        results = exchange(result, longest_transfer(sum(sizes.values())))
        mismatches = sorted(result for result in results if result)
        yield mismatches[0][1] if mismatches else checkpoint


def share_files(sizes: dict[str, int], reader: int, readers: int) -> list[str]:
    """Return the files of one of `readers` readers, in the order of `sizes`.

    The largest first, each to the reader with the fewest bytes: no reader has more than 4/3 of what the best
    distribution of complete files gives (Graham, 1969). A file isn't split, as its checksum is that of all its bytes.
    """
    loads, owner = [0] * readers, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return [name for name in sizes if owner[name] == reader]


def _identify(checkpoint: Checkpoint | str) -> list[Any] | None:
    """Return what is equal on two ranks if they see the same folder, and not for copies of it; None if it's invalid.

    A shared disk has the same inode numbers and times on all nodes (that of its device differs). If it doesn't, as some
    object stores, each node reads all files.
    """
    if isinstance(checkpoint, str):
        return None
    stat = (checkpoint.folder / COMPLETE).stat()
    return [checkpoint.manifest["digest"], stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _digests(identities: Iterable[list[Any] | None]) -> list[str | None]:
    return [identity[0] if identity else None for identity in identities]
