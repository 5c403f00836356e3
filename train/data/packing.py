"""Which rows share a sequence: full ones, each a mixture of all lengths, as many for every rank, anew each epoch."""

import hashlib
import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# How many documents may share a sequence. FlashAttention-2's backward pass keeps 128 rows of padding for each document
# (mha_varlen_bwd: dq_accum is [total_q + 128 * documents, heads, head_dim] in float32). Before flash-attention 2.8 it
# computed `128 * document * heads * head_dim` in int32, so that 2**24 / (heads * head_dim) documents in ONE call
# overflow into an illegal memory access: 4,096 documents of an 8B model (32 x 128), 2,048 of a 70B one (64 x 128).
# flash-attention#1311 shows the crash, #1500 mends it. The padding itself stays: at 64 x 128, 4 MiB a document. Half
# of the least bound leaves room for batches of two in one call and for that memory, and no chat comes near it.
DOCUMENTS_PER_SEQUENCE = 1_024

# The shares of all tokens that are held back as fillers, the most mixed composition first; 1 is best-fit decreasing.
_HELD_BACK = (0.0, 1 / 64, 1 / 32, 1 / 16, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
_JITTER = 0.03  # rows of nearly equal length change places from epoch to epoch; more costs filling
_FULL = (0.9995, 0.999)  # how full sequences are that exchange rows; at 8,192 tokens, 4 and 8 of room on average
_ROUNDS = 100  # of exchanges; most sequences need one or two
_SPARE = 4  # places in a sequence for rows that move into it
_PARTNERS = 64  # that a sequence may meet in a round
_ELEMENTS = 1 << 22  # differences of lengths looked at in one go: 32 MB
_MAGIC = b"packing plan 1\n"


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """Which rows make up each sequence.

    `rows`: int32 [rows], the row indices of one sequence after the other; every row from 0 is there exactly once.
    `ends`: int64 [sequences + 1], where in `rows` each sequence ends, after a 0. Both are read-only.
    Raises ValueError for arrays that are no plan.
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
        """The number of sequences."""
        return len(self.ends) - 1

    def __getitem__(self, sequence: int) -> NDArray[np.int32]:
        """The row indices of one sequence. Raises IndexError past the last."""
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
        """Read what `save` wrote. Raises ValueError for a file that is no plan or was not written to its end."""
        written = Path(path).read_bytes()
        if not written.startswith(_MAGIC):
            raise ValueError(f"{path} is not a packing plan")
        digest, content = written[len(_MAGIC) :][:32], written[len(_MAGIC) + 32 :]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"{path} is a broken packing plan; remove it, it is made again")
        arrays = io.BytesIO(content)
        return cls(np.load(arrays, allow_pickle=False), np.load(arrays, allow_pickle=False))


def pack(lengths: Sequence[int], capacity: int, documents_per_sequence: int | None = None) -> list[list[int]]:
    """Put rows into as few sequences of at most `capacity` tokens as best-fit decreasing finds, over ALL rows.

    Best-fit decreasing (Johnson 1973): the longest row first, each into the fullest sequence that still has room and
    fewer than `documents_per_sequence` rows. Gives the row indices of each sequence; every row is in exactly one, none
    is cut. The same lengths give the same sequences. Takes O(rows x log(rows)) and one bit a token of capacity for each
    look-up. Rows of like length end up together; `plan_packing` mixes them.

    Raises ValueError for a row that is empty or longer than `capacity`, and for a cap below 1.
    """
    most = _most_documents(lengths, capacity, documents_per_sequence)
    sequences: list[list[int]] = []
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    _best_fit(longest_first, lengths, capacity, most, sequences, [], may_open=True)
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
    """Sequences as full as best-fit decreasing's, each a mixture of long and short rows, as many in every epoch.

    `lengths`: tokens of each row. `capacity`: tokens that a sequence holds; None: no packing, one row a sequence in the
    order given. `multiple_of`: ranks x sequences per device and micro step, so that all ranks get equally many.

    The NUMBER OF SEQUENCES follows from the lengths alone, rounded up to `multiple_of`: so many that they are 99.95 %
    or 99.9 % full, where that can be had; at most that of best-fit decreasing and a thousandth more. Where there are
    fewer rows than that (or no packing), there are as many sequences as rows. The COMPOSITION follows from (seed,
    epoch).

    Best-fit decreasing alone would put rows of like length, hence of like kind, together. So the rows are dealt, the
    longest first, each to the emptiest sequence (Graham's LPT rule, 1969), which gives every sequence its share of each
    length; then full and empty sequences exchange rows until none holds more than its capacity. Where lengths are too
    ragged for that (many of more than half the capacity), the shortest rows are held back and fill what room is left
    by best-fit decreasing, as few as are enough; and where nothing else fits, all are, and only rows of equal length
    change places.

    Raises ValueError for a row that is empty or longer than `capacity`, and for arguments below 1.
    """
    tokens = np.asarray(lengths, np.int64)
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; it is 1 or more")
    if capacity is None:
        return PackingPlan(np.arange(len(tokens), dtype=np.int32), np.arange(len(tokens) + 1, dtype=np.int64))
    in_python = tokens.tolist()
    most = _most_documents(in_python, capacity, documents_per_sequence)
    chance = np.random.Generator(np.random.PCG64([seed, epoch])).random(len(tokens))

    def rounded(number: int) -> int:
        return min(-(-number // multiple_of) * multiple_of, len(tokens))

    fewest = len(pack(in_python, capacity, documents_per_sequence))
    enough = fewest + fewest // 1_000
    sequences: list[list[int]] | None = None
    least = tokens.sum() / capacity
    for number in sorted({rounded(min(max(math.ceil(least), int(least / full)), enough)) for full in _FULL}):
        unshuffled = _level(np.argsort(-tokens, kind="stable"), tokens, capacity, most, number)
        if unshuffled is not None:
            jittered = np.argsort(-tokens * (1 + _JITTER * chance), kind="stable")
            sequences = _level(jittered, tokens, capacity, most, number)
            sequences = sequences or _with_equals_shuffled(unshuffled, tokens, chance)
            break
    if sequences is None:
        sequences = _fill(tokens, in_python, chance, capacity, most, rounded(enough))
    ends = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return PackingPlan(np.fromiter((row for rows in sequences for row in rows), np.int32, len(tokens)), ends)


def _fill(
    tokens: NDArray[np.int64],
    in_python: Sequence[int],
    chance: NDArray[np.float64],
    capacity: int,
    most: int,
    number: int,
) -> list[list[int]]:
    """So many sequences, with as few rows held back as fillers as will do."""
    longest_first = np.lexsort((chance, -tokens))
    tokens_so_far = np.cumsum(tokens[longest_first])
    sequences: list[list[int]] | None = None
    for held_back in _HELD_BACK:
        dealt = int(np.searchsorted(tokens_so_far, (1 - held_back) * tokens.sum(), side="right"))
        first, last = longest_first[:dealt], longest_first[dealt:]
        jittered = first[np.argsort(-tokens[first] * (1 + _JITTER * chance[first]), kind="stable")]
        sequences = _deal_and_fill(jittered.tolist(), last.tolist(), in_python, capacity, most, number)
        if sequences is not None:
            break
    assert sequences is not None, "best-fit decreasing fits into as many sequences as it takes"
    return _split([sequence for sequence in sequences if sequence], in_python, number)


def _level(
    order: NDArray[np.int64], tokens: NDArray[np.int64], capacity: int, most: int, number: int
) -> list[list[int]] | None:
    """Deal the rows in this order to so many sequences, then exchange rows until none is too long; None: it can't be.

    In each round the sequences that are too long meet as many of the emptiest, each time another one, and each pair
    exchanges the two rows that bring it nearest to being equal.
    """
    sequences = _deal(order.tolist(), tokens.tolist(), capacity * 2, most, number)
    if not sequences or not all(sequences) or int((2 * tokens > capacity).sum()) > number:
        return None
    widest = min(max(map(len, sequences)) + _SPARE, most)  # some places stay free for rows that move
    rows = np.full((number, widest), -1)
    for place, members in enumerate(sequences):
        rows[place, : len(members)] = members
    held = np.where(rows >= 0, tokens[rows], 0)
    meeting = np.random.Generator(np.random.PCG64(0))
    for _ in range(_ROUNDS):
        totals = held.sum(axis=1)
        if totals.max() <= capacity:
            return [members[members >= 0].tolist() for members in rows]
        others = meeting.permutation(np.flatnonzero(totals <= capacity))
        full = np.flatnonzero(totals > capacity)[: len(others)]
        if not len(full):
            return None
        each = min(_PARTNERS, len(others) // len(full))
        asking, asked = np.repeat(full, each), others[: len(full) * each]
        left = np.empty(len(asking))
        chosen = np.empty((2, len(asking)), np.int64)
        at_once = max(1, _ELEMENTS // widest**2)
        for start in range(0, len(asking), at_once):
            some = slice(start, start + at_once)
            theirs, ours = held[asked[some]][:, None, :], held[asking[some]][:, :, None]
            over, room = totals[asking[some]] - capacity, capacity - totals[asked[some]]
            moved = ours - theirs
            excess = np.maximum(over[:, None, None] - moved, 0) + np.maximum(moved - room[:, None, None], 0)
            score = excess + np.abs(2 * moved - (over + room)[:, None, None]) / (8 * capacity)  # then: the more alike
            score[np.broadcast_to(ours == 0, score.shape)] = np.inf  # there is no row; into a free place one may move
            best = score.reshape(len(score), -1).argmin(axis=1)
            chosen[:, some] = best // widest, best % widest
            left[some] = np.take_along_axis(score.reshape(len(score), -1), best[:, None], axis=1)[:, 0]
        partner = left.reshape(-1, each).argmin(axis=1) + np.arange(len(full)) * each
        partner = partner[left[partner] < totals[full] - capacity]
        here, there = (asking[partner], chosen[0][partner]), (asked[partner], chosen[1][partner])
        for values in (rows, held):
            values[here], values[there] = values[there], values[here]
    return None


def _with_equals_shuffled(
    sequences: list[list[int]], tokens: NDArray[np.int64], chance: NDArray[np.float64]
) -> list[list[int]]:
    """The same lengths in each sequence, of rows that change places with others of their length."""
    takes_the_place_of = np.empty(len(tokens), np.int64)
    takes_the_place_of[np.argsort(tokens, kind="stable")] = np.lexsort((chance, tokens))
    return [takes_the_place_of[rows].tolist() for rows in sequences]


def _most_documents(lengths: Sequence[int], capacity: int, documents_per_sequence: int | None) -> int:
    """The cap as a number. Raises ValueError for arguments under which some row has no place."""
    for row, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"row {row} has {length} tokens; a sequence holds 1 to {capacity}")
    if documents_per_sequence is None:
        return max(len(lengths), 1)
    if documents_per_sequence < 1:
        raise ValueError(f"documents_per_sequence is {documents_per_sequence}; it is 1 or more, or None for no cap")
    return documents_per_sequence


def _best_fit(
    rows: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    most: int,
    sequences: list[list[int]],
    tokens: Sequence[int],
    *,
    may_open: bool,
) -> bool:
    """Add each row to the fullest of `sequences` (with so many `tokens`) that has room and fewer than `most` rows.

    Gives False where a row fits nowhere and no further sequence may be opened.
    """
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room in tokens -> sequences that have just that
    for sequence, used in enumerate(tokens):
        if len(sequences[sequence]) < most:
            with_room[capacity - used].append(sequence)
    # bit r is set where with_room[r] is not empty, so the least room that is enough is one shift away
    rooms = int.from_bytes(np.packbits([bool(waiting) for waiting in with_room], bitorder="little").tobytes(), "little")
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
        left = room - length
        if left and len(sequences[sequence]) < most:
            with_room[left].append(sequence)
            rooms |= 1 << left
    return True


def _deal(rows: Sequence[int], lengths: Sequence[int], capacity: int, most: int, number: int) -> list[list[int]] | None:
    """Each row to the emptiest of so many sequences that has fewer than `most`; None where one would get too long."""
    sequences: list[list[int]] = [[] for _ in range(number)]
    emptiest = [(0, sequence) for sequence in range(number)]  # a heap of (tokens, sequence) of those below the cap
    for row in rows:
        if not emptiest or emptiest[0][0] + lengths[row] > capacity:
            return None
        used, sequence = emptiest[0]
        sequences[sequence].append(row)
        if len(sequences[sequence]) < most:
            heapq.heapreplace(emptiest, (used + lengths[row], sequence))
        else:
            heapq.heappop(emptiest)
    return sequences


def _deal_and_fill(
    first: Sequence[int], last: Sequence[int], lengths: Sequence[int], capacity: int, most: int, number: int
) -> list[list[int]] | None:
    """Deal the rows `first`, then fit in those of `last` by best-fit decreasing; None where there is no room."""
    sequences = _deal(first, lengths, capacity, most, number)
    if sequences is None:
        return None
    tokens = [sum(lengths[row] for row in rows) for rows in sequences]
    return sequences if _best_fit(last, lengths, capacity, most, sequences, tokens, may_open=False) else None


def _split(sequences: list[list[int]], lengths: Sequence[int], number: int) -> list[list[int]]:
    """Split the fullest sequence of several rows into halves of about equal tokens until there are so many."""
    fullest = [(-sum(lengths[row] for row in rows), place) for place, rows in enumerate(sequences) if len(rows) > 1]
    heapq.heapify(fullest)
    while len(sequences) < number:
        place = heapq.heappop(fullest)[1]
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for row in sorted(sequences[place], key=lengths.__getitem__, reverse=True):
            emptier = int(tokens[1] < tokens[0])
            halves[emptier].append(row)
            tokens[emptier] += lengths[row]
        sequences[place] = halves[0]
        sequences.append(halves[1])
        for half, used, where in zip(halves, tokens, (place, len(sequences) - 1), strict=True):
            if len(half) > 1:
                heapq.heappush(fullest, (-used, where))
    return sequences
