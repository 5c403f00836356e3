"""Map-style data sets of packed sequences, assembled from token rows on disk when they are asked for."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.loss_mask import NOT_TRAINED, make_labels, make_token_weights
from train.data.packing import PackingPlan
from train.data.tokens.table import TokenTable

LOSS_WEIGHTS = "loss_weights"
"""Key of the loss weights of a sequence's tokens, in data sets that have them."""


class PackedDataset:
    """The sequences of a split, for torch's DataLoader.

    Sequence i of epoch e has the index e * len(self) + i. So the index alone decides what a process reads, whichever
    process it is and whatever it read before.

    `rows_by_source`: name of each source with rows in this data set -> number of rows in an epoch.
    """

    def __init__(
        self,
        table: TokenTable,
        chosen: NDArray[np.int64],
        max_length: int,
        plan_of: Callable[[int], PackingPlan],
        *,
        packed: bool,
    ) -> None:
        """`chosen`: numbers of the rows that are trained, truncated to `max_length`. `plan_of`: epoch -> its plan."""
        self._table, self._chosen, self._max_length, self._packed = table, chosen, max_length, packed
        self.lengths = np.minimum(table.lengths[chosen], max_length)
        self.has_loss_weights = bool(table.has_loss_weight[chosen].any())
        self.plan_of = lru_cache(maxsize=2)(plan_of)
        self._count = len(self.plan_of(0))
        counts = np.bincount(table.source_of(chosen))
        self._source_numbers = np.flatnonzero(counts)
        self.rows_by_source = {table.source_names[number]: int(counts[number]) for number in self._source_numbers}

    def __len__(self) -> int:
        """Return the number of sequences of an epoch."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence.

        - `input_ids`, `labels`: int64 [tokens].
        - `seq_lengths`: the number of tokens of each document; only where rows are packed.
        - `loss_weights`: float32 [tokens], 0 where not trained; only if the data set has a loss weight other than 1.
        - `sequence`: the index itself, the argument of `places`.
        """
        numbers = self._documents(index)
        documents = [self.row(number) for number in numbers]
        item: dict[str, Any] = {
            "input_ids": np.concatenate([ids for ids, _ in documents]).astype(np.int64),
            "labels": np.concatenate([labels for _, labels in documents]),
            "sequence": int(index),
        }
        if self._packed:
            item["seq_lengths"] = [len(ids) for ids, _ in documents]
        if self.has_loss_weights:
            item[LOSS_WEIGHTS] = np.concatenate([self.loss_weights(number) for number in numbers])
        return item

    def digest(self) -> str:
        """Return a digest of the numbers of the chosen rows, in their order."""
        return xxhash.xxh3_128(self._chosen.astype("<i8").tobytes()).hexdigest()

    def places(self, index: int) -> list[str]:
        """Return the place of each document of a sequence: its file and line or row."""
        return [self._table.place(int(self._chosen[number])) for number in self._documents(index)]

    def sources(self, index: int) -> NDArray[np.int64]:
        """Return the source of each document of a sequence: its position in `rows_by_source`."""
        numbers = self._table.source_of(self._chosen[self._documents(index)])
        return np.searchsorted(self._source_numbers, numbers)

    def _documents(self, index: int) -> list[int]:
        if index < 0 or not self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        epoch, sequence = divmod(int(index), self._count)
        return self.plan_of(epoch)[sequence].tolist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the sequences of the first epoch. (Python's default would never end: there is no last index.)"""
        return (self[sequence] for sequence in range(self._count))

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids and labels of one of the chosen rows, truncated."""
        row = int(self._chosen[number])
        ids = self._table.ids(row)[: self._max_length]
        return ids, make_labels(ids, self._table.trained(row))

    def loss_weights(self, number: int) -> NDArray[np.float32]:
        """Return the loss weights of the tokens of one of the chosen rows, truncated; 0 where not trained."""
        row = int(self._chosen[number])
        return make_token_weights(int(self.lengths[number]), self._table.trained(row), self._table.loss_weights(row))


class PaddedDataset:
    """A `PackedDataset`, extended to a multiple of `at_once` by sequences without labels.

    accelerate fills the last batches with the first rows again (`even_batches`), as all ranks must run the same number
    of batches; in a sum over tokens those rows would count twice.
    """

    def __init__(self, sequences: PackedDataset, at_once: int) -> None:
        self._sequences = sequences
        self._count = -(-len(sequences) // at_once) * at_once

    def __len__(self) -> int:
        """Return the number of sequences, those without labels included."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sequence as `PackedDataset` does; past its end, one in which no token has a label."""
        if index < len(self._sequences):
            return self._sequences[index]
        item = self._sequences[0]
        return {**item, "labels": np.full_like(item["labels"], NOT_TRAINED)}
