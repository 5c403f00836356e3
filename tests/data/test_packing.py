import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.packing import DOCUMENTS_PER_SEQUENCE, PackingPlan, pack, plan_packing


def best_fit_decreasing(lengths: list[int], capacity: int, most: int = 10**9) -> list[list[int]]:
    """Pack with the textbook loop: for each row, longest first, try every sequence."""
    sequences: list[tuple[int, list[int]]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [
            place
            for place, (room, _) in enumerate(sequences)
            if room >= lengths[row] and len(sequences[place][1]) < most
        ]
        if fitting:
            place = min(fitting, key=lambda place: sequences[place][0])
            room, rows = sequences[place]
            sequences[place] = (room - lengths[row], [*rows, row])
        else:
            sequences.append((capacity - lengths[row], [row]))
    return [rows for _, rows in sequences]


@pytest.mark.parametrize("seed", range(20))
def test_packs_as_well_as_the_textbook_loop(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 300])
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 200))]
    packed = pack(lengths, capacity)
    assert sorted(row for sequence in packed for row in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in sequence) <= capacity for sequence in packed)
    expected = best_fit_decreasing(lengths, capacity)
    rooms = lambda sequences: sorted(sum(lengths[row] for row in sequence) for sequence in sequences)  # noqa: E731
    assert rooms(packed) == rooms(expected)


@pytest.mark.parametrize("seed", range(20))
def test_caps_the_documents_as_the_textbook_loop_does(seed: int) -> None:
    rng = random.Random(seed)
    capacity, most = rng.choice([7, 64, 300]), rng.randint(1, 5)
    lengths = [rng.randint(1, max(capacity // 4, 1)) for _ in range(rng.randint(0, 200))]
    packed = pack(lengths, capacity, most)
    assert sorted(row for sequence in packed for row in sequence) == list(range(len(lengths)))
    assert max(map(len, packed), default=0) == max(map(len, best_fit_decreasing(lengths, capacity, most)), default=0)
    assert len(packed) == len(best_fit_decreasing(lengths, capacity, most))


def test_the_same_lengths_give_the_same_sequences() -> None:
    lengths = [random.Random(1).randint(1, 100) for _ in range(500)]
    assert pack(lengths, 100) == pack(list(lengths), 100)


def test_fills_nearly_all_of_log_normal_rows() -> None:
    rng = random.Random(0)
    lengths = [min(max(int(rng.lognormvariate(6.7, 0.6)), 1), 8_192) for _ in range(20_000)]
    fewest = -(-sum(lengths) // 8_192)
    assert fewest <= len(pack(lengths, 8_192)) <= fewest * 1.001


@pytest.mark.parametrize("length", [0, -1, 11])
def test_refuses_a_row_that_no_sequence_can_hold(length: int) -> None:
    with pytest.raises(ValueError, match="row 1 has"):
        pack([5, length], 10)


@pytest.mark.parametrize("documents", [0, -1])
def test_refuses_a_cap_under_which_no_sequence_holds_a_row(documents: int) -> None:
    with pytest.raises(ValueError, match="documents_per_sequence must be"):
        pack([5], 10, documents)
    with pytest.raises(ValueError, match="documents_per_sequence must be"):
        plan_packing([5], 10, documents_per_sequence=documents)


def sequences_of(packed: PackingPlan) -> list[list[int]]:
    return [packed[sequence].tolist() for sequence in range(len(packed))]


@given(
    st.integers(1, 40).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity)))),
    st.integers(1, 9),
    st.none() | st.integers(1, 6),
    st.integers(0, 3),
)
def test_a_plan_has_every_row_once_in_sequences_that_fit_and_divide_evenly(
    capacity_and_lengths: tuple[int, list[int]], multiple_of: int, documents: int | None, epoch: int
) -> None:
    capacity, lengths = capacity_and_lengths
    packed = plan_packing(lengths, capacity, multiple_of=multiple_of, documents_per_sequence=documents, epoch=epoch)
    sequences = sequences_of(packed)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in rows) <= capacity for rows in sequences)
    assert all(len(rows) <= (documents or len(lengths)) for rows in sequences)
    fewest = len(best_fit_decreasing(lengths, capacity, documents or 10**9))
    rounded_up = next(number for number in range(fewest, fewest + multiple_of) if number % multiple_of == 0)
    assert sum(lengths) <= capacity * len(packed)
    assert len(packed) <= min(rounded_up, len(lengths))
    assert len(packed) % multiple_of == 0 or len(packed) == len(lengths)


def lengths_of(kind: str, rows: int = 20_000) -> tuple[list[int], int]:
    rng = np.random.default_rng(0)
    lengths, capacity = {
        "chats": (np.exp(rng.normal(np.log(1_000), 0.5, rows)), 8_192),
        "uniform": (rng.integers(1, 8_193, rows), 8_192),
        "short": (rng.geometric(1 / 75, rows), 512),
        "bimodal": (np.where(rng.random(rows) < 0.5, rng.normal(6_000, 300, rows), rng.normal(300, 60, rows)), 8_192),
        "quickstart": (rng.normal(75, 18, rows), 512),
    }[kind]  # fmt: skip
    return np.clip(lengths, 1, capacity).astype(int).tolist(), capacity


KINDS = ["chats", "uniform", "short", "bimodal", "quickstart"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_as_full_as_best_fit_decreasing_in_every_epoch(kind: str) -> None:
    lengths, capacity = lengths_of(kind)
    fewest = len(pack(lengths, capacity))
    numbers = {len(plan_packing(lengths, capacity, seed=seed, epoch=epoch)) for seed in range(2) for epoch in range(3)}
    assert len(numbers) == 1
    assert fewest / min(numbers) >= 0.999


@pytest.mark.parametrize("kind", ["chats", "long tail", "uniform", "narrow"])
def test_sequences_are_full_where_lengths_allow_it(kind: str) -> None:
    """Also for rows that leave gaps under best-fit decreasing (99.7 % and less for chats)."""
    rng = np.random.default_rng(1)
    drawn = {
        "chats": np.exp(rng.normal(np.log(1_000), 0.5, 20_000)),
        "long tail": np.exp(rng.normal(np.log(1_100), 0.9, 20_000)),
        "uniform": rng.integers(1, 3_001, 20_000),
        "narrow": np.exp(rng.normal(np.log(1_020), 0.3, 20_000)),
    }[kind]
    lengths = np.clip(drawn, 1, 8_192).astype(int)
    for epoch in range(2):
        packed = plan_packing(lengths, 8_192, epoch=epoch)
        assert lengths.sum() / (8_192 * len(packed)) >= 0.999
        assert sorted(packed.rows.tolist()) == list(range(20_000))
        assert max(lengths[rows].sum() for rows in (packed[sequence] for sequence in range(len(packed)))) <= 8_192


def likeness(lengths: list[int], sequences: list[list[int]]) -> float:
    """Return the correlation of a row's log length with that of another row of its sequence: 1 equal, 0 random."""
    values = np.log(lengths) - np.log(lengths).mean()
    together = 0.0
    for rows in sequences:
        if len(rows) > 1:
            own = values[rows]
            together += float((own.sum() ** 2 - (own**2).sum()) / (len(rows) - 1))
    return together / len(lengths) / float(values.var())


@pytest.mark.parametrize(
    ("kind", "rows"), [("chats", 20_000), ("short", 20_000), ("quickstart", 360), ("chats", 2_000)]
)
def test_a_plan_mixes_the_lengths_that_best_fit_decreasing_sorts(kind: str, rows: int) -> None:
    lengths, capacity = lengths_of(kind, rows)
    assert likeness(lengths, pack(lengths, capacity)) > 0.4
    assert likeness(lengths, sequences_of(plan_packing(lengths, capacity))) < 0.2


@pytest.mark.parametrize(("kind", "rows"), [("chats", 2_000), ("short", 2_000), ("quickstart", 360)])
def test_each_epoch_and_each_seed_has_another_composition(kind: str, rows: int) -> None:
    lengths, capacity = lengths_of(kind, rows)

    def pairs(**chosen: int) -> set[tuple[int, int]]:
        packed = sequences_of(plan_packing(lengths, capacity, **chosen))
        return {(a, b) for sequence in packed for a in sequence for b in sequence if a < b}

    first = pairs(seed=1, epoch=0)
    assert first == pairs(seed=1, epoch=0)
    for other in (pairs(seed=1, epoch=1), pairs(seed=2, epoch=0)):
        assert len(first & other) < 0.15 * len(first)


def test_ranks_get_equally_many_sequences_of_about_equal_length() -> None:
    lengths, capacity = lengths_of("quickstart", 360)
    packed = plan_packing(lengths, capacity, multiple_of=64)
    assert len(packed) == 64
    tokens = [sum(lengths[row] for row in rows) for rows in sequences_of(packed)]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_splits_the_fullest_where_only_the_plain_packing_fits() -> None:
    packed = plan_packing([6, 4, 5, 5, 7, 3, 9, 1], 10, multiple_of=3)  # 4 full sequences
    assert sorted(sum([6, 4, 5, 5, 7, 3, 9, 1][row] for row in rows) for rows in sequences_of(packed))[-1] <= 9
    assert len(packed) == 6


def test_without_packing_each_row_is_a_sequence_in_the_order_given() -> None:
    assert sequences_of(plan_packing([5, 9_000, 1], None, multiple_of=2)) == [[0], [1], [2]]


def test_the_default_cap_holds() -> None:
    packed = plan_packing([1] * 10_000, 8_192)
    assert max(len(rows) for rows in sequences_of(packed)) <= DOCUMENTS_PER_SEQUENCE
    assert len(packed) == 10


@given(st.lists(st.integers(1, 20)))
def test_a_plan_comes_back_from_disk_and_the_same_plan_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("plans")
    for name in ("one", "two"):
        plan_packing(lengths, 20).save(folder / name)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    loaded = PackingPlan.load(folder / "one")
    assert sequences_of(loaded) == sequences_of(plan_packing(lengths, 20))
    assert (loaded.rows.dtype, loaded.ends.dtype) == (np.int32, np.int64)


def test_refuses_a_broken_file_and_one_that_is_not_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan_packing"
    plan_packing([3, 4, 5], 7).save(path)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="packing plan"):
            PackingPlan.load(path)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="packing plan"):
            PackingPlan.load(path)


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ([0, 1], [0, 1]),
        ([0, 0], [0, 2]),
        ([0, 2], [0, 2]),
        ([0, 1], [0, 0, 2]),
        ([0, 1], [1, 2]),
        ([], []),
        ([0, -1], [0, 2]),
    ],
)
def test_refuses_arrays_that_lose_double_or_misplace_rows(rows: list[int], ends: list[int]) -> None:
    with pytest.raises(ValueError, match="packing plan"):
        PackingPlan(np.array(rows, np.int32), np.array(ends, np.int64))
