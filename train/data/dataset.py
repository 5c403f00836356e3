"""The sequences that are trained: put together from rows on disk when they are asked for."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.loss_mask import NOT_TRAINED, labels_of
from train.data.packing import PackingPlan
from train.data.tokens.table import TokenRows


class PackedDataset:
    """A map-style data set, as torch's DataLoader takes it.

    Sequence i of epoch e has the index e * len(self) + i, so that what a process reads follows from the index alone,
    whichever process it is and whatever it read before.
    """

    def __init__(
        self,
        rows: TokenRows,
        chosen: NDArray[np.int64],
        max_length: int,
        plan_of: Callable[[int], PackingPlan],
        *,
        packed: bool,
    ) -> None:
        """`chosen`: the rows that are trained, which are cut to `max_length`; `plan_of`: the plan of an epoch."""
        self._rows, self._chosen, self._max_length, self._packed = rows, chosen, max_length, packed
        self.lengths = np.minimum(rows.lengths[chosen], max_length)
        self.plan_of = lru_cache(maxsize=2)(plan_of)
        self._count = len(self.plan_of(0))

    def __len__(self) -> int:
        """Sequences of an epoch."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` and `labels` (int64), and where the recipe packs `seq_lengths`, the tokens of each document.

        `sequence` is the index itself, by which `places` tells the rows.
        """
        documents = [self.row(place) for place in self._documents(index)]
        item: dict[str, Any] = {
            "input_ids": np.concatenate([ids for ids, _ in documents]).astype(np.int64),
            "labels": np.concatenate([labels for _, labels in documents]),
            "sequence": int(index),
        }
        if self._packed:
            item["seq_lengths"] = [len(ids) for ids, _ in documents]
        return item

    def digest(self) -> str:
        """Return a digest of the rows that are chosen, by number, in their order."""
        return xxhash.xxh3_128(self._chosen.astype("<i8").tobytes()).hexdigest()

    def places(self, index: int) -> list[str]:
        """Where each document of a sequence stood in its source, in words."""
        return [self._rows.place(int(self._chosen[place])) for place in self._documents(index)]

    def _documents(self, index: int) -> list[int]:
        if index < 0 or not self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        epoch, sequence = divmod(int(index), self._count)
        return self.plan_of(epoch)[sequence].tolist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The sequences of the first epoch. (Python would go through indices, of which there are no last ones.)"""
        return (self[sequence] for sequence in range(self._count))

    def row(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids and labels of one of the chosen rows, as they are trained."""
        row = int(self._chosen[place])
        ids = self._rows.ids(row)[: self._max_length]
        return ids, labels_of(ids, self._rows.trained(row))


class PaddedDataset:
    """`sequences`, and behind them as many that count for nothing as make their number a multiple of `at_once`.

    Where the last batches aren't full, accelerate fills them with the first rows again (`even_batches`), as all ranks
    must run equally many; in a sum over tokens those would count twice.
    """

    def __init__(self, sequences: PackedDataset, at_once: int) -> None:
        self._sequences = sequences
        self._count = -(-len(sequences) // at_once) * at_once

    def __len__(self) -> int:
        """With those that count for nothing."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As of `PackedDataset`; none of its tokens is labelled where it counts for nothing."""
        if index < len(self._sequences):
            return self._sequences[index]
        item = self._sequences[0]
        return {**item, "labels": np.full_like(item["labels"], NOT_TRAINED)}
