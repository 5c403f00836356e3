"""Which rows share a sequence."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few sequences of at most `capacity` tokens as best-fit decreasing finds, over ALL rows.

    Best-fit decreasing (Johnson 1973): the longest row first, each into the fullest sequence that still has room. Gives
    the row indices of each sequence; every row is in exactly one, none is cut. The same lengths give the same
    sequences. Takes O(rows x log(rows)) and one bit a token of capacity for each look-up.

    Raises ValueError for a row that is empty or longer than `capacity`.
    """
    sequences: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room in tokens -> sequences that have just that
    rooms = 0  # bit r is set where with_room[r] is not empty, so the least room that is enough is one shift away
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[row]
        if not 0 < length <= capacity:
            raise ValueError(f"row {row} has {length} tokens; a sequence holds 1 to {capacity}")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            sequences[sequence].append(row)
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([row])
        left = room - length
        if left:
            with_room[left].append(sequence)
            rooms |= 1 << left
    return sequences
