"""Map-style data set of packed pairs: sequences of chosen and rejected halves, assembled when they are asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.dataset import PackedDataset
from train.data.loss_mask import make_labels
from train.data.packing import PackingPlan
from train.data.tokens.pairs import TokenPairs, Tokens


class PairDataset(PackedDataset):
    """The sequences of a split of pairs. A pair is never divided: both of its halves are in one sequence.

    sequence   chosen 7 | rejected 7 | chosen 31 | rejected 31       seq_lengths  [210, 180, 95, 120]   pairs  [7, 31]

    The plan is one of pairs, and `lengths` holds the tokens of each pair. `rows_by_source` counts pairs.
    """

    def __init__(
        self, pairs: TokenPairs, max_length: int, plan_of: Callable[[NDArray[np.int32], int], PackingPlan]
    ) -> None:
        """`max_length`: halves are truncated to it. `plan_of`: tokens of each pair, epoch -> its plan."""
        self.half_lengths = np.minimum(pairs.lengths, max_length)
        lengths = self.half_lengths.sum(axis=1, dtype=np.int32)
        super().__init__(pairs.table, pairs.rows[:, 0], max_length, partial(plan_of, lengths), packed=True)
        self._pairs, self.lengths = pairs, lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence.

        - `input_ids`, `labels`: int64 [tokens].
        - `seq_lengths`: the number of tokens of each document: chosen, rejected, chosen, rejected, ...
        - `pairs`: int64 [pairs], the number of each pair in the split, below `len(lengths)`.
        - `sequence`: the index itself, the argument of `places`.
        """
        numbers = self._documents(index)
        documents = [half for number in numbers for half in self.pair(number)]
        return {
            "input_ids": np.concatenate([ids for ids, _ in documents]).astype(np.int64),
            "labels": np.concatenate([labels for _, labels in documents]),
            "seq_lengths": [len(ids) for ids, _ in documents],
            "pairs": np.asarray(numbers, np.int64),
            "sequence": int(index),
        }

    def digest(self) -> str:
        """Return a digest of the rows of all pairs, in their order."""
        return xxhash.xxh3_128(self._pairs.rows.astype("<i8").tobytes()).hexdigest()

    def places(self, index: int) -> list[str]:
        """Return the place of each document of a sequence; that of a sibling's answer is the sibling's."""
        return [self._table.place(row) for row in self._pairs.rows[self._documents(index)].ravel().tolist()]

    def sources(self, index: int) -> NDArray[np.int64]:
        """Return the source of each document of a sequence: its position in `rows_by_source`."""
        return super().sources(index).repeat(2)

    def pair(self, number: int) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Return the ids and labels of the chosen and the rejected half of a pair, truncated."""
        return [self._truncate(half) for half in self._pairs.halves(number)]

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids and labels of the chosen half of a pair, truncated."""
        return self.pair(number)[0]

    def _truncate(self, half: Tokens) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        ids, trained = half
        ids = ids[: self._max_length]
        return ids, make_labels(ids, trained)
