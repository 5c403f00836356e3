"""Log-likelihoods on disk: a command that was killed continues with the rows that are not scored."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from train.data.loss_mask import EncodedRow
from train.errors import UserError


class ScoreCache:
    """A file with a line per score: a digest of model and tokens, and the sum of ln p. Use it in a `with` block.

    `model`: its fingerprint and dtype. Other lines, as a crash leaves half a line, are skipped.
    Raises UserError if the file can't be written.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model.encode()
        self._scores: dict[str, float] = {}
        try:
            self._lines = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise self._unwritable(error) from error
        self._lines.seek(0)
        for line in self._lines:
            with suppress(ValueError, TypeError):  # json raises a ValueError; a line may be JSON of another form
                key, score = json.loads(line)
                self._scores[key] = float(score)
        self._lines.write("\n")  # after half a line

    def find(self, row: EncodedRow) -> float | None:
        """Return the score of a row, or None if it isn't stored."""
        return self._scores.get(self._key(row))

    def add(self, rows: Sequence[EncodedRow], scores: Sequence[float]) -> None:
        """Write scores to the file, flushed when this returns."""
        try:
            self._lines.writelines(
                json.dumps([self._key(row), score]) + "\n" for row, score in zip(rows, scores, strict=True)
            )
            self._lines.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path} can't be written: {error.strerror}.")

    def _key(self, row: EncodedRow) -> str:
        digest = hashlib.blake2b(self._model, digest_size=12)
        digest.update(row.ids.astype("<i8").tobytes())
        digest.update(row.trained.astype("<i8").tobytes())
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._lines.close()
        except OSError as error:
            if kind is None:  # else an error is being raised already
                raise self._unwritable(error) from error
