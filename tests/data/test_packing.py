import random

import pytest

from train.data.packing import pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook loop: for each row, longest first, look at every sequence."""
    sequences: list[tuple[int, list[int]]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [place for place, (left, _) in enumerate(sequences) if left >= lengths[row]]
        if fitting:
            place = min(fitting, key=lambda place: sequences[place][0])
            left, rows = sequences[place]
            sequences[place] = (left - lengths[row], [*rows, row])
        else:
            sequences.append((capacity - lengths[row], [row]))
    return [rows for _, rows in sequences]


@pytest.mark.parametrize("seed", range(20))
def test_packs_as_well_as_the_textbook_loop(seed: int) -> None:
    chance = random.Random(seed)
    capacity = chance.choice([1, 7, 64, 300])
    lengths = [chance.randint(1, capacity) for _ in range(chance.randint(0, 200))]
    packed = pack(lengths, capacity)
    assert sorted(row for sequence in packed for row in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in sequence) <= capacity for sequence in packed)
    expected = best_fit_decreasing(lengths, capacity)
    rooms = lambda sequences: sorted(sum(lengths[row] for row in sequence) for sequence in sequences)  # noqa: E731
    assert rooms(packed) == rooms(expected)


def test_the_same_lengths_give_the_same_sequences() -> None:
    lengths = [random.Random(1).randint(1, 100) for _ in range(500)]
    assert pack(lengths, 100) == pack(list(lengths), 100)


def test_fills_nearly_all_of_log_normal_rows() -> None:
    chance = random.Random(0)
    lengths = [min(max(int(chance.lognormvariate(6.7, 0.6)), 1), 8_192) for _ in range(20_000)]
    fewest = -(-sum(lengths) // 8_192)
    assert fewest <= len(pack(lengths, 8_192)) <= fewest * 1.001


@pytest.mark.parametrize("length", [0, -1, 11])
def test_refuses_a_row_that_no_sequence_can_hold(length: int) -> None:
    with pytest.raises(ValueError, match="row 1 has"):
        pack([5, length], 10)
