"""Whether a text is nearly one that came before: MinHash and locality-sensitive hashing, kept on the disk."""

import sqlite3
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from train.datagen.text_units import extract_ngrams, split_words

_HASHES = 128
_SEED = 42
_FOUND = 0.99


class NearDuplicateFilter:
    """Tells whether a text is nearly one of those before, by the Jaccard similarity of their runs of three words.

    The similarity is estimated from 128 MinHash values (rensa), with a standard error of at most 0.044; a pair of
    exactly the threshold's similarity is compared at all with a chance of 0.99 or more (locality-sensitive hashing),
    a more similar one with a higher. Only texts that were kept are compared with, so the order counts: of A, B and C,
    where A and C are both like B but not alike, B alone is left out, or A and C if B came first.

    A text takes 0.2 ms at a threshold of 0.8. At 0.5 and below many unlike ones are compared, and a text takes
    milliseconds that grow with how many came before.

    What is remembered is in a temporary database of SQLite on the disk (in SQLITE_TMPDIR or TMPDIR, else /var/tmp;
    gone when the process is), so the memory doesn't grow with the number of texts.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold is above 0 and at most 1, not {threshold}")
        self.threshold = threshold
        self._rows = _rows_per_band(threshold)
        self._database = sqlite3.connect("", isolation_level=None)  # "": a private file on the disk
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE; PRAGMA cache_size = -8192;
            CREATE TABLE signatures (message INTEGER PRIMARY KEY, signature BLOB);
            CREATE TABLE bands (band INTEGER, message INTEGER, PRIMARY KEY (band, message)) WITHOUT ROWID;
            BEGIN;
            """
        )
        marks = ", ".join("?" * (_HASHES // self._rows))
        self._candidates = (
            f"SELECT signature FROM signatures WHERE message IN (SELECT message FROM bands WHERE band IN ({marks}))"
        )

    def is_near_duplicate(self, text: str) -> bool:
        """Whether a text before is this similar. If none is, this one is remembered."""
        signature = _signature(text)
        bands = self._bands(signature)
        cursor = self._database.execute(self._candidates, bands)
        while some := cursor.fetchmany(256):
            if self._is_similar(signature, (before for (before,) in some)):
                cursor.close()
                return True
        message = self._database.execute("INSERT INTO signatures (signature) VALUES (?)", (signature,)).lastrowid
        self._database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(band, message) for band in bands])
        return False

    def close(self) -> None:
        """Forget everything."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bands(self, signature: bytes) -> list[int]:
        """A number for each band of the signature, the same for the same values."""
        import xxhash

        size = 4 * self._rows
        starts = range(0, _HASHES // self._rows * size, size)
        numbers = (xxhash.xxh3_64_intdigest(signature[start : start + size]) for start in starts)
        return [number - 2**63 for number in numbers]  # SQLite's integers have a sign

    def _is_similar(self, signature: bytes, others: Iterable[bytes]) -> bool:
        import numpy

        ours = numpy.frombuffer(signature, dtype=numpy.uint32)
        theirs = numpy.frombuffer(b"".join(others), dtype=numpy.uint32).reshape(-1, _HASHES)
        return bool(((theirs == ours).sum(axis=1) >= self.threshold * _HASHES).any())


def _signature(text: str) -> bytes:
    """128 MinHash values of 32 bits. A text of fewer than three words is one run."""
    import numpy
    from rensa import RMinHash

    words = split_words(text) or text.split()  # nothing but marks
    runs = extract_ngrams(words, min(3, len(words)))
    hashes = RMinHash(num_perm=_HASHES, seed=_SEED)
    hashes.update(sorted(" ".join(run).encode("utf-8", "surrogatepass") for run in runs))
    return numpy.array(hashes.digest(), dtype=numpy.uint32).tobytes()


def _rows_per_band(threshold: float) -> int:
    """The longest bands that still find a pair of the threshold's similarity: the longer, the fewer are compared."""
    found = [rows for rows in range(1, _HASHES + 1) if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= _FOUND]
    return max(found, default=1)
