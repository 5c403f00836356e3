"""The collection on disk, in the order of the sources.

data/rows.jsonl, or data/rows-00000.parquet, ...    what `train/sft.py` trains on: `path: OUTPUT_DIR/data`
pairs/rows.jsonl, or pairs/rows-00000.parquet, ...  preference pairs
left_out.jsonl                                      every instruction and set that is not in them, with the reason
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow

from train.datagen.dataset_writer import JsonLines, RowFiles, open_rows
from train.errors import UserError
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.result import Outcome, left_out_of, pairs_of, rows_of
from train.storage.atomic_write import fsync

DATA, PAIRS, LEFT_OUT = "data", "pairs", "left_out.jsonl"


def _texts(*names: str) -> list[tuple[str, pyarrow.DataType]]:
    return [(name, pyarrow.string()) for name in names]


_PREFERENCE = pyarrow.struct(_texts("dimension", "subdimension", "preference", "description"))
_TURNS = pyarrow.list_(pyarrow.struct(_texts("content", "role")))
ROW_SCHEMA = pyarrow.schema(
    [
        *_texts("main_source", "original_source"),
        ("preference_set", pyarrow.list_(_PREFERENCE)),
        *_texts("system", "prompt", "output"),
    ]
)
PAIR_SCHEMA = pyarrow.schema(
    [*_texts("main_source", "original_source", "system", "prompt"), ("chosen", _TURNS), ("rejected", _TURNS)]
)


class Output:
    """Writes outcomes, in their order. Use it in a `with` block; call `finish` when there are no more."""

    def __init__(self, config: CollectionConfig) -> None:
        self._config = config
        self._folder = folder = Path(config.output_dir)
        try:
            self._rows: RowFiles = open_rows(folder / DATA, config.output, ROW_SCHEMA)
            self._pairs: RowFiles | None = None
            if config.pairs != "none" or (folder / PAIRS).exists():  # those of an earlier run must go
                self._pairs = open_rows(folder / PAIRS, config.output, PAIR_SCHEMA)
            self._left_out = JsonLines(folder / LEFT_OUT)
        except OSError as error:
            raise UserError(f"output_dir: {folder} can't be written to: {error.strerror}.") from error

    def write(self, outcome: Outcome) -> int:
        """What there is to write of one more instruction; how many pairs it made.

        Raises UserError where the disk takes no more; what was written before is whole.
        """
        pairs = pairs_of(outcome, self._config.pairs, self._config.seed)
        try:
            for row in rows_of(outcome):
                self._rows.write(row)
            for pair in pairs:
                assert self._pairs is not None
                self._pairs.write(pair)
            for row in left_out_of(outcome):
                self._left_out.write(row)
        except OSError as error:
            raise self._no_more(error) from error
        return len(pairs)

    def finish(self) -> None:
        """There are no more. Raises UserError as `write` does."""
        try:
            for files in self._files():
                files.finish()
            fsync(self._folder / DATA)
            if self._pairs is not None:
                fsync(self._folder / PAIRS)
        except OSError as error:
            raise self._no_more(error) from error

    def _files(self) -> list[RowFiles]:
        return [self._rows, self._left_out, *([self._pairs] if self._pairs is not None else [])]

    def _no_more(self, error: OSError) -> UserError:
        return UserError(
            f"output_dir: {self._folder} can't be written to: {error.strerror}. The answers are in the journal: "
            "make room, and start the same command again."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for files in self._files():
            files.close()
