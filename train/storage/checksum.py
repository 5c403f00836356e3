"""TODO: train.storage.checksum."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from train.errors import UserError


def hash_files(files: Iterable[Path], facts: Iterable[object] = ()) -> str:
    """One digest (xxh3, 128 bits, hexadecimal) of the bytes of all files, where each ends, and some facts beside them.

    Raises UserError for a file that can't be read.
    """
    whole = xxhash.xxh3_128(repr(list(facts)).encode())
    for path in files:
        one = xxhash.xxh3_128()
        try:
            with path.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    one.update(piece)
        except OSError as fault:
            raise UserError(f"{path}: can't be read: {fault.strerror}.") from fault
        whole.update(one.digest())
    return whole.hexdigest()
