"""Checksums of files."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from train.errors import UserError

_CHUNK = 1 << 22


def hash_files(files: Iterable[Path], facts: Iterable[object] = ()) -> str:
    """Return one hash (xxh3, 128 bits, hexadecimal) of the contents of all files in their order, and of `facts`.

    Raises UserError for a file that can't be read.
    """
    combined = xxhash.xxh3_128(repr(list(facts)).encode())
    for path in files:
        content = xxhash.xxh3_128()
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    content.update(chunk)
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}.") from error
        combined.update(content.digest())
    return combined.hexdigest()
