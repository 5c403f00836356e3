"""Siblings: rows of one source with the same instruction under different system messages.

`siblings` of a source limits their number. In preference training each row's answer is chosen under its own message,
and the answer that a sibling has under another message is rejected. For that, rows are compared by their tokens:
siblings have the same instruction (`sibling_key`), another prompt and another answer.

    row 1   m1 q | a1        pair (1, 2)   chosen m1 q | a1    rejected m1 q | a2
    row 2   m2 q | a2        pair (2, 1)   chosen m2 q | a2    rejected m2 q | a1
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.sources.source import BadRows
from train.data.tokens.pairs import sibling_key
from train.data.tokens.table import TokenTable
from train.errors import UserError
from train.formatting import format_count
from train.recipe import PreferenceSection, Source, TrainingSource

ALONE = "no other row has its instruction under another system message"
SAME_ANSWER = "its siblings have the same answer"
_MOST_SIBLINGS = 100
"""Rows of one instruction that are paired with all others: 9,900 pairs."""


@dataclass(frozen=True, slots=True)
class LeftOutRows:
    """Rows of one source that are not trained, as they have too many siblings or none.

    `key`: the source's key in the recipe. `rows`: rows of the source. `reasons`: reason -> the rows left out.
    """

    key: str
    rows: int
    reasons: dict[str, BadRows] = field(default_factory=dict)


def limit_siblings(
    key: str,
    source: TrainingSource,
    conversations: NDArray[np.int64],
    table: TokenTable,
    first_rows: NDArray[np.int64],
    seed: int,
) -> tuple[NDArray[np.int64], LeftOutRows | None]:
    """Return the conversations of one source that its `siblings` keeps, and the others; None without that key.

    Of each instruction as many are drawn, by the seed. A smaller number keeps some of those that a larger one keeps.
    """
    if source.siblings is None:
        return conversations, None
    rows = first_rows[conversations]
    _, instruction = np.unique(table.questions[rows], return_inverse=True)
    order = np.lexsort((np.random.Generator(np.random.PCG64(seed)).random(len(rows)), instruction))
    starts = np.searchsorted(instruction[order], instruction[order])
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - starts
    kept = rank < source.siblings
    left_out = LeftOutRows(f"{key}.siblings", len(rows))
    for row in rows[~kept].tolist():
        reason = f"more than {format_count(source.siblings, 'row')} of an instruction"
        left_out.reasons.setdefault(reason, BadRows()).add(table.place(row), "left out by the seed")
    return conversations[kept], left_out


def pair_rows(
    key: str,
    source: Source,
    conversations: NDArray[np.int64],
    table: TokenTable,
    settings: PreferenceSection,
    seed: int,
) -> tuple[NDArray[np.int64], LeftOutRows | None]:
    """Return the pairs of the conversations of one source: int64 [pairs, 2], rows of the chosen and rejected answers.

    A conversation of two rows is a pair itself; the others are paired with siblings, and rows without one are counted.
    Raises UserError, naming `key`, if there is no pair.
    """
    first = np.searchsorted(table.conversations, conversations)
    if (np.searchsorted(table.conversations, conversations, side="right") - first == 2).all():
        return np.stack([first, first + 1], axis=1), None
    pairs, unpaired = pair_siblings(key, first, table, settings.pairs, seed)
    if not len(pairs):
        raise UserError(
            f"{key}: {source.path} has no pair: no `chosen` and `rejected`, and of its {len(first):,} rows no two have "
            "the same instruction under different system messages and different answers."
        )
    return pairs, unpaired


def pair_siblings(
    key: str, rows: NDArray[np.int64], table: TokenTable, which: Literal["one", "all"], seed: int
) -> tuple[NDArray[np.int64], LeftOutRows]:
    """Return the pairs of rows of one source: int64 [pairs, 2], chosen and rejected; and the rows without one.

    - one: with one sibling. In an order that the seed and the rows alone decide, each row's is the next one that has
      another message and another answer. So each answer is rejected about as often as it is chosen.
    - all: with all siblings.

    Raises UserError, naming `key`, for an instruction of too many rows to pair each with all others.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    halves: list[tuple[bytes, bytes]] = []  # digests of prompt and answer
    for number, (row, question) in enumerate(zip(rows.tolist(), table.questions[rows].tolist(), strict=True)):
        ids, start = table.ids(row), int(table.first_trained[row])
        groups[sibling_key(question, (ids, table.trained(row)))].append(number)
        halves.append((_digest(ids[:start]), _digest(ids[start:])))
    unpaired = LeftOutRows(key, len(rows))
    pairs: list[tuple[int, int]] = []
    for members in groups.values():
        if which == "all" and len(members) > _MOST_SIBLINGS:
            raise UserError(
                f"{key}: {len(members):,} rows have the same instruction, the first of them "
                f"{table.place(rows[members[0]])}: too many to pair each with all others. Write `siblings: "
                f"{_MOST_SIBLINGS}` or less under the source, or `preference.pairs: one`."
            )
        members.sort(key=lambda number: _draw(seed, *halves[number]))
        for position, own in enumerate(members):
            prompt, answer = halves[own]
            others = [*members[position + 1 :], *members[:position]]
            siblings = (other for other in others if halves[other][0] != prompt and halves[other][1] != answer)
            own_pairs = [(own, sibling) for sibling in islice(siblings, 1 if which == "one" else None)]
            pairs += own_pairs
            if not own_pairs:
                reason = ALONE if all(halves[other][0] == prompt for other in others) else SAME_ANSWER
                detail = f"{format_count(len(members), 'row')} with its instruction"
                unpaired.reasons.setdefault(reason, BadRows()).add(table.place(rows[own]), detail)
    numbers = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return rows[numbers], unpaired


def _digest(ids: NDArray[np.int32]) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids).data)


def _draw(seed: int, *digests: bytes) -> bytes:
    return hashlib.blake2b(b"".join([str(seed).encode(), *digests]), digest_size=8).digest()
