"""Near-duplicate texts: MinHash and locality-sensitive hashing, kept on disk."""

import sqlite3
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from train.datagen.text_units import extract_ngrams, split_words

_HASHES = 128
_SEED = 42
_MIN_RECALL = 0.99


class NearDuplicateFilter:
    """Filter for texts that are similar to an earlier one, by the Jaccard similarity of their 3-grams of words.

    - The similarity is estimated from 128 MinHash values (rensa), with a standard error of at most 0.044. A pair at the
      threshold is compared with a probability of at least 0.99, a more similar pair with a higher one.
    - Texts are compared only with texts that were kept, so the order counts: if B is similar to A and C, and those are
      not similar, B alone is a duplicate after A, and A and C are duplicates after B.
    - A text takes 0.2 ms at a threshold of 0.8. At 0.5 and below, many dissimilar texts are compared: a text takes
      milliseconds, and more as the number of texts grows.
    - Signatures are in a temporary SQLite database on disk (in SQLITE_TMPDIR or TMPDIR, else /var/tmp; removed when the
      process ends), so that memory does not grow with the number of texts.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, not {threshold}")
        self.threshold = threshold
        self._rows = _compute_rows_per_band(threshold)
        self._database = sqlite3.connect("", isolation_level=None)  # "": a private file on disk
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
        """Return whether an earlier text is similar; if none is, remember this one."""
        signature = _compute_signature(text)
        bands = self._hash_bands(signature)
        cursor = self._database.execute(self._candidates, bands)
        while batch := cursor.fetchmany(256):
            if self._is_similar(signature, (earlier for (earlier,) in batch)):
                cursor.close()
                return True
        message = self._database.execute("INSERT INTO signatures (signature) VALUES (?)", (signature,)).lastrowid
        self._database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(band, message) for band in bands])
        return False

    def close(self) -> None:
        """Forget all texts."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hash_bands(self, signature: bytes) -> list[int]:
        """Return a hash of each band of the signature."""
        import xxhash

        size = 4 * self._rows
        starts = range(0, _HASHES // self._rows * size, size)
        hashes = (xxhash.xxh3_64_intdigest(signature[start : start + size]) for start in starts)
        return [number - 2**63 for number in hashes]  # SQLite's integers are signed

    def _is_similar(self, signature: bytes, others: Iterable[bytes]) -> bool:
        import numpy

        own = numpy.frombuffer(signature, dtype=numpy.uint32)
        stacked = numpy.frombuffer(b"".join(others), dtype=numpy.uint32).reshape(-1, _HASHES)
        return bool(((stacked == own).sum(axis=1) >= self.threshold * _HASHES).any())


def _compute_signature(text: str) -> bytes:
    """Return 128 MinHash values of 32 bits. A text of fewer than three words is one n-gram."""
    import numpy
    from rensa import RMinHash

    words = split_words(text) or text.split()  # nothing but punctuation
    ngrams = extract_ngrams(words, min(3, len(words)))
    hashes = RMinHash(num_perm=_HASHES, seed=_SEED)
    hashes.update(sorted(" ".join(ngram).encode("utf-8", "surrogatepass") for ngram in ngrams))
    return numpy.array(hashes.digest(), dtype=numpy.uint32).tobytes()


def _compute_rows_per_band(threshold: float) -> int:
    """Return the largest band whose recall at the threshold suffices: the larger, the fewer texts are compared."""
    sizes = [rows for rows in range(1, _HASHES + 1) if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= _MIN_RECALL]
    return max(sizes, default=1)
