"""Log-likelihoods that were computed, on disk: what is killed goes on with the rows that it had not scored."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from train.data.loss_mask import EncodedRow
from train.errors import UserError


class ScoreCache:
    """One line a score: a digest of the model and the tokens, and the sum of ln p. Use it in a `with` block.

    `model`: what tells it from others (`fingerprint`), and its dtype. What is no such line is passed over: a
    crash leaves half a one. Raises UserError where the file can't be written, or not to its end.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model.encode()
        self._known: dict[str, float] = {}
        try:
            self._lines = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as fault:
            raise self._refused(fault) from fault
        self._lines.seek(0)
        for line in self._lines:
            with suppress(ValueError, TypeError):  # json's own is a ValueError; a line may be JSON of another kind
                key, score = json.loads(line)
                self._known[key] = float(score)
        self._lines.write("\n")  # after half a line

    def find(self, row: EncodedRow) -> float | None:
        """The score of a row, if it was computed."""
        return self._known.get(self._key(row))

    def add(self, rows: Sequence[EncodedRow], scores: Sequence[float]) -> None:
        """Write scores down; they are there when this returns, also for a process that is killed."""
        try:
            self._lines.writelines(
                json.dumps([self._key(row), score]) + "\n" for row, score in zip(rows, scores, strict=True)
            )
            self._lines.flush()
        except OSError as fault:
            raise self._refused(fault) from fault

    def _refused(self, fault: OSError) -> UserError:
        return UserError(f"{self._path} can't be written: {fault.strerror}.")

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
        except OSError as fault:
            if kind is None:  # else what was raised already says so
                raise self._refused(fault) from fault
