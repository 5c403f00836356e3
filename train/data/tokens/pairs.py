"""Pairs of token rows: the prompt and the chosen answer of one row, the same prompt and a rejected answer."""

import numpy as np
from numpy.typing import NDArray

from train.data.tokens.table import TokenTable

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids [tokens], and the trained spans in them [spans, 2]."""


def join_answer(prompt: Tokens, answer: Tokens) -> Tokens:
    """Return the tokens of one row up to its answer, and those of another row from its answer on.

    prompt   p p p p|a a a        answer   q q|b b        result   p p p p|b b
    """
    (ids, trained), (other_ids, other_trained) = prompt, answer
    start, other_start = int(trained[0, 0]), int(other_trained[0, 0])
    return np.concatenate([ids[:start], other_ids[other_start:]]), other_trained - other_start + start


def sibling_key(instruction: bytes, row: Tokens) -> bytes:
    """Return what siblings share: the digest of their instruction, and the tokens just before the answer.

    A template may write those by the kind of answer, such as an empty block of thoughts.
    """
    (ids, trained), tail = row, 4
    start = int(trained[0, 0])
    return instruction + ids[max(start - tail, 0) : start].tobytes()


class TokenPairs:
    """Pairs over a token table.

    - `rows`: int64 [pairs, 2], the row of the chosen answer and the row that has the rejected one. Where they are one
      conversation, the rejected half is that row; else they are siblings, and it is the first row's prompt with the
      second row's answer.
    - `is_sibling`: bool [pairs], the rows are siblings.
    - `lengths`, `first_trained`: int32 [pairs, 2], tokens of each half, and the number of its first trained token.
    """

    def __init__(self, table: TokenTable, rows: NDArray[np.int64]) -> None:
        self.table, self.rows = table, rows
        of_chosen, of_rejected = table.conversations[rows].T
        self.is_sibling = of_chosen != of_rejected
        self.first_trained = table.first_trained[rows]
        self.lengths = table.lengths[rows]
        moved = np.where(self.is_sibling, self.first_trained[:, 0] - self.first_trained[:, 1], 0)
        self.first_trained[:, 1] += moved
        self.lengths[:, 1] += moved

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: NDArray[np.int64]) -> "TokenPairs":
        """Return the pairs of these numbers."""
        return TokenPairs(self.table, self.rows[numbers])

    def halves(self, number: int) -> tuple[Tokens, Tokens]:
        """Return the tokens of the chosen and the rejected half of a pair."""
        chosen, rejected = ((self.table.ids(row), self.table.trained(row)) for row in self.rows[number].tolist())
        return chosen, join_answer(chosen, rejected) if self.is_sibling[number] else rejected
