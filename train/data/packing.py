"""Packing plans: rows -> full sequences, each a mixture of all lengths, equally many per rank, new in each epoch."""

import hashlib
import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DOCUMENTS_PER_SEQUENCE = 1_024
"""The default cap on the documents of a sequence.

FlashAttention-2's backward pass keeps 128 rows of padding per document (mha_varlen_bwd: dq_accum is
[total_q + 128 * documents, heads, head_dim] in float32). Before flash-attention 2.8 it computed
`128 * document * heads * head_dim` in int32, so 2**24 / (heads * head_dim) documents in ONE call overflow into an
illegal memory access: 4,096 documents of an 8B model (32 x 128), 2,048 of a 70B model (64 x 128). flash-attention#1311
shows the crash, #1500 fixes it. The padding itself remains: at 64 x 128, 4 MiB per document. Half of the smallest bound
leaves room for batches of two in one call and for that memory, and no chat comes near it.
"""

_FILLER_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
"""Shares of all tokens that are held back as fillers, the best mixture first; 1 is best-fit decreasing."""
_JITTER = 0.03
"""Relative noise on lengths: rows of similar length swap between epochs. A larger value costs filling."""
_TARGET_FILLING = (0.9995, 0.999)
"""Filling of the sequences that exchange rows: at 8,192 tokens, 4 and 8 tokens of room on average."""
_ROUNDS = 100
"""Rounds of exchanges; most sequences need one or two."""
_FREE_SLOTS = 4
"""Slots of a sequence for rows that move into it."""
_PARTNERS = 64
"""Sequences that an overfull one may be paired with in a round."""
_ELEMENTS = 1 << 22
"""Differences of lengths computed at once: 32 MB."""
_MAGIC = b"packing plan 1\n"


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """The rows of each sequence.

    - `rows`: int32 [rows], the row indices of one sequence after the other; each row occurs exactly once.
    - `ends`: int64 [sequences + 1], a 0 and then the end of each sequence in `rows`. Both are read-only.

        rows  [4 0 | 2 | 1 3 5]      ends  [0 2 3 6]

    Raises ValueError for arrays that are not a plan.
    """

    rows: NDArray[np.int32]
    ends: NDArray[np.int64]

    def __post_init__(self) -> None:
        rows, ends = self.rows, self.ends
        if rows.dtype != np.int32 or ends.dtype != np.int64 or rows.ndim != 1 or ends.ndim != 1:
            raise ValueError("a packing plan has int32 rows and int64 ends, of one dimension each")
        if not len(ends) or ends[0] != 0 or ends[-1] != len(rows) or (np.diff(ends) < 1).any():
            raise ValueError("the ends of a packing plan rise from 0 to the number of rows; no sequence is empty")
        if not np.array_equal(np.sort(rows), np.arange(len(rows))):
            raise ValueError("a packing plan has every row exactly once")
        rows.flags.writeable = ends.flags.writeable = False

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.ends) - 1

    def __getitem__(self, sequence: int) -> NDArray[np.int32]:
        """Return the row indices of one sequence. Raises IndexError past the last."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        return self.rows[self.ends[sequence] : self.ends[sequence + 1]]

    def save(self, path: str | Path) -> None:
        """Write the plan to one file. The same plan gives the same bytes (np.savez would write the time)."""
        content = io.BytesIO()
        np.save(content, self.rows)
        np.save(content, self.ends)
        Path(path).write_bytes(_MAGIC + hashlib.sha256(content.getvalue()).digest() + content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "PackingPlan":
        """Read a plan that `save` wrote. Raises ValueError if the file is not a plan or is incomplete."""
        written = Path(path).read_bytes()
        if not written.startswith(_MAGIC):
            raise ValueError(f"{path} is not a packing plan")
        digest, content = written[len(_MAGIC) :][:32], written[len(_MAGIC) + 32 :]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"{path} is a broken packing plan; remove it, and it is computed again")
        arrays = io.BytesIO(content)
        return cls(np.load(arrays, allow_pickle=False), np.load(arrays, allow_pickle=False))


def pack(lengths: Sequence[int], capacity: int, documents_per_sequence: int | None = None) -> list[list[int]]:
    """Pack rows into as few sequences of at most `capacity` tokens as best-fit decreasing finds, over ALL rows.

    Best-fit decreasing (Johnson 1973): each row, the longest first, goes into the fullest sequence that still has room
    and fewer than `documents_per_sequence` rows. Returns the row indices of each sequence; every row is in exactly one,
    none is cut. The same lengths give the same sequences. Takes O(rows x log(rows)), and one bit per token of capacity
    for each look-up. Rows of similar length end up together; `plan_packing` mixes them.

    Raises ValueError for a row that is empty or longer than `capacity`, and for a cap below 1.
    """
    max_documents = _check_arguments(lengths, capacity, documents_per_sequence)
    sequences: list[list[int]] = []
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    _best_fit(longest_first, lengths, capacity, max_documents, sequences, [], may_open=True)
    return sequences


def plan_packing(
    lengths: Sequence[int] | NDArray[np.integer],
    capacity: int | None,
    *,
    multiple_of: int = 1,
    documents_per_sequence: int | None = DOCUMENTS_PER_SEQUENCE,
    seed: int = 0,
    epoch: int = 0,
) -> PackingPlan:
    """Return sequences as full as those of best-fit decreasing, each with long and short rows.

    - `lengths`: tokens of each row.
    - `capacity`: tokens of a sequence; None: no packing, one row per sequence in the given order.
    - `multiple_of`: ranks x sequences per device and micro step, so that all ranks get equally many.
    - `seed`, `epoch`: decide the composition.

    The NUMBER OF SEQUENCES follows from the lengths alone, so it is the same in every epoch: that of sequences that are
    99.95 % full (else 99.9 %), where that can be reached, and at most that of best-fit decreasing plus a thousandth;
    rounded up to `multiple_of`. It never exceeds the number of rows.

    THE COMPOSITION. Best-fit decreasing alone would put rows of similar length, hence of similar kind, together. So

    1. the rows are dealt, the longest first, each to the emptiest sequence (Graham's LPT rule, 1969): every sequence
       gets its share of each length. Then overfull and other sequences exchange rows until all fit (`_level`).
    2. Where lengths are too uneven for that (many above half the capacity), the shortest rows are held back, as few as
       possible, and fill the room that is left by best-fit decreasing (`_fill`).
    3. Where only best-fit decreasing itself fits, rows of equal length are swapped.

    Raises ValueError for a row that is empty or longer than `capacity`, and for arguments below 1.
    """
    tokens = np.asarray(lengths, np.int64)
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, not {multiple_of}")
    if capacity is None:
        return PackingPlan(np.arange(len(tokens), dtype=np.int32), np.arange(len(tokens) + 1, dtype=np.int64))
    token_list = tokens.tolist()
    max_documents = _check_arguments(token_list, capacity, documents_per_sequence)
    noise = np.random.Generator(np.random.PCG64([seed, epoch])).random(len(tokens))

    def round_up(number: int) -> int:
        return min(-(-number // multiple_of) * multiple_of, len(tokens))

    best_fit = len(pack(token_list, capacity, documents_per_sequence))
    upper_bound = best_fit + best_fit // 1_000
    lower_bound = tokens.sum() / capacity
    targets = {
        round_up(min(max(math.ceil(lower_bound), int(lower_bound / filling)), upper_bound))
        for filling in _TARGET_FILLING
    }
    sequences: list[list[int]] | None = None
    for number in sorted(targets):
        unshuffled = _level(np.argsort(-tokens, kind="stable"), tokens, capacity, max_documents, number)
        if unshuffled is not None:
            jittered = np.argsort(-tokens * (1 + _JITTER * noise), kind="stable")
            sequences = _level(jittered, tokens, capacity, max_documents, number)
            sequences = sequences or _swap_equals(unshuffled, tokens, noise)
            break
    if sequences is None:
        sequences = _fill(tokens, token_list, noise, capacity, max_documents, round_up(upper_bound))
    ends = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return PackingPlan(np.fromiter((row for rows in sequences for row in rows), np.int32, len(tokens)), ends)


def _fill(
    tokens: NDArray[np.int64],
    token_list: Sequence[int],
    noise: NDArray[np.float64],
    capacity: int,
    max_documents: int,
    number: int,
) -> list[list[int]]:
    """Return `number` sequences with as few rows held back as fillers as possible."""
    longest_first = np.lexsort((noise, -tokens))
    cumulative = np.cumsum(tokens[longest_first])
    sequences: list[list[int]] | None = None
    for share in _FILLER_SHARES:
        dealt = int(np.searchsorted(cumulative, (1 - share) * tokens.sum(), side="right"))
        first, fillers = longest_first[:dealt], longest_first[dealt:]
        jittered = first[np.argsort(-tokens[first] * (1 + _JITTER * noise[first]), kind="stable")]
        sequences = _deal_and_fill(jittered.tolist(), fillers.tolist(), token_list, capacity, max_documents, number)
        if sequences is not None:
            break
    assert sequences is not None, "best-fit decreasing fits into the number of sequences that it needs"
    return _split([sequence for sequence in sequences if sequence], token_list, number)


def _level(
    order: NDArray[np.int64], tokens: NDArray[np.int64], capacity: int, max_documents: int, number: int
) -> list[list[int]] | None:
    """Deal the rows in this order to `number` sequences, then exchange rows until all fit; None if they can't.

    In each round every overfull sequence is paired with several others, and exchanges with the best of them the two
    rows that bring both nearest to equal fillings.
    """
    sequences = _deal(order.tolist(), tokens.tolist(), capacity * 2, max_documents, number)
    if not sequences or not all(sequences) or int((2 * tokens > capacity).sum()) > number:
        return None
    slots = min(max(map(len, sequences)) + _FREE_SLOTS, max_documents)
    rows = np.full((number, slots), -1)  # the rows of each sequence; -1: a free slot
    for sequence, members in enumerate(sequences):
        rows[sequence, : len(members)] = members
    held = np.where(rows >= 0, tokens[rows], 0)  # their tokens
    pairing_rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(_ROUNDS):
        totals = held.sum(axis=1)
        if totals.max() <= capacity:
            return [members[members >= 0].tolist() for members in rows]
        others = pairing_rng.permutation(np.flatnonzero(totals <= capacity))
        overfull = np.flatnonzero(totals > capacity)[: len(others)]
        if not len(overfull):
            return None
        partners = min(_PARTNERS, len(others) // len(overfull))
        givers, takers = np.repeat(overfull, partners), others[: len(overfull) * partners]
        best_score = np.empty(len(givers))
        best_slots = np.empty((2, len(givers)), np.int64)  # of the giver, of the taker
        pairs_at_once = max(1, _ELEMENTS // slots**2)
        for start in range(0, len(givers), pairs_at_once):
            pairs = slice(start, start + pairs_at_once)
            given, taken = held[givers[pairs]][:, :, None], held[takers[pairs]][:, None, :]
            over, room = totals[givers[pairs]] - capacity, capacity - totals[takers[pairs]]
            moved = given - taken  # tokens that move to the taker, for each pair of slots
            excess = np.maximum(over[:, None, None] - moved, 0) + np.maximum(moved - room[:, None, None], 0)
            # Less excess is better; among equals, more equal fillings.
            score = excess + np.abs(2 * moved - (over + room)[:, None, None]) / (8 * capacity)
            score[np.broadcast_to(given == 0, score.shape)] = np.inf  # a giver's free slot; a taker's may be filled
            best = score.reshape(len(score), -1).argmin(axis=1)
            best_slots[:, pairs] = best // slots, best % slots
            best_score[pairs] = np.take_along_axis(score.reshape(len(score), -1), best[:, None], axis=1)[:, 0]
        pair = best_score.reshape(-1, partners).argmin(axis=1) + np.arange(len(overfull)) * partners
        pair = pair[best_score[pair] < totals[overfull] - capacity]
        here, there = (givers[pair], best_slots[0][pair]), (takers[pair], best_slots[1][pair])
        for values in (rows, held):
            values[here], values[there] = values[there], values[here]
    return None


def _swap_equals(sequences: list[list[int]], tokens: NDArray[np.int64], noise: NDArray[np.float64]) -> list[list[int]]:
    """Return sequences of the same lengths, in which rows are swapped with others of equal length."""
    replacement = np.empty(len(tokens), np.int64)
    replacement[np.argsort(tokens, kind="stable")] = np.lexsort((noise, tokens))
    return [replacement[rows].tolist() for rows in sequences]


def _check_arguments(lengths: Sequence[int], capacity: int, documents_per_sequence: int | None) -> int:
    """Return the cap on documents as a number. Raises ValueError for a row that doesn't fit and a cap below 1."""
    for row, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"row {row} has {length} tokens; a sequence holds 1 to {capacity}")
    if documents_per_sequence is None:
        return max(len(lengths), 1)
    if documents_per_sequence < 1:
        raise ValueError(f"documents_per_sequence must be >= 1, or None for no cap; not {documents_per_sequence}")
    return documents_per_sequence


def _best_fit(
    rows: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    max_documents: int,
    sequences: list[list[int]],
    tokens: Sequence[int],
    *,
    may_open: bool,
) -> bool:
    """Add each row to the fullest of `sequences` that has room and fewer than `max_documents` rows.

    `tokens`: those of each sequence. Returns False if a row fits nowhere and no further sequence may be opened.
    """
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room in tokens -> sequences with exactly that room
    for sequence, used in enumerate(tokens):
        if len(sequences[sequence]) < max_documents:
            with_room[capacity - used].append(sequence)
    # bit r is set where with_room[r] is not empty, so the smallest sufficient room is one shift away
    rooms = int.from_bytes(np.packbits([bool(members) for members in with_room], bitorder="little").tobytes(), "little")
    for row in rows:
        length = lengths[row]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            sequences[sequence].append(row)
        elif may_open:
            room, sequence = capacity, len(sequences)
            sequences.append([row])
        else:
            return False
        room -= length
        if room and len(sequences[sequence]) < max_documents:
            with_room[room].append(sequence)
            rooms |= 1 << room
    return True


def _deal(
    rows: Sequence[int], lengths: Sequence[int], capacity: int, max_documents: int, number: int
) -> list[list[int]] | None:
    """Deal each row to the emptiest of `number` sequences that isn't at the cap; None if one overflows."""
    sequences: list[list[int]] = [[] for _ in range(number)]
    emptiest = [(0, sequence) for sequence in range(number)]  # a heap of (tokens, sequence) of those below the cap
    for row in rows:
        if not emptiest or emptiest[0][0] + lengths[row] > capacity:
            return None
        used, sequence = emptiest[0]
        sequences[sequence].append(row)
        if len(sequences[sequence]) < max_documents:
            heapq.heapreplace(emptiest, (used + lengths[row], sequence))
        else:
            heapq.heappop(emptiest)
    return sequences


def _deal_and_fill(
    first: Sequence[int], fillers: Sequence[int], lengths: Sequence[int], capacity: int, max_documents: int, number: int
) -> list[list[int]] | None:
    """Deal the rows `first`, then add the fillers by best-fit decreasing; None if there is no room."""
    sequences = _deal(first, lengths, capacity, max_documents, number)
    if sequences is None:
        return None
    tokens = [sum(lengths[row] for row in rows) for rows in sequences]
    return (
        sequences if _best_fit(fillers, lengths, capacity, max_documents, sequences, tokens, may_open=False) else None
    )


def _split(sequences: list[list[int]], lengths: Sequence[int], number: int) -> list[list[int]]:
    """Split the fullest sequence of several rows into halves of similar tokens until there are `number`."""
    fullest = [(-sum(lengths[row] for row in rows), index) for index, rows in enumerate(sequences) if len(rows) > 1]
    heapq.heapify(fullest)
    while len(sequences) < number:
        index = heapq.heappop(fullest)[1]
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for row in sorted(sequences[index], key=lengths.__getitem__, reverse=True):
            emptier = int(tokens[1] < tokens[0])
            halves[emptier].append(row)
            tokens[emptier] += lengths[row]
        sequences[index] = halves[0]
        sequences.append(halves[1])
        for half, used, position in zip(halves, tokens, (index, len(sequences) - 1), strict=True):
            if len(half) > 1:
                heapq.heappush(fullest, (-used, position))
    return sequences
