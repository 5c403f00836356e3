"""Packed pairs: every pair once, never divided, both halves as they are on disk; siblings joined by hand."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.data.loss_mask import NOT_TRAINED, EncodedRow
from train.data.packing import plan_packing
from train.data.pair_dataset import PairDataset
from train.data.sources.formats import Conversation
from train.data.tokens.pairs import TokenPairs, join_answer
from train.data.tokens.table import TokenTable, make_batch, write_table

MAX_LENGTH = 64


def encoded(rng: np.random.Generator, longest: int) -> EncodedRow:
    """A row of random tokens, of which one or two spans at its end are trained."""
    length = int(rng.integers(4, longest))
    start = int(rng.integers(1, min(length - 2, MAX_LENGTH - 1)))
    spans = [[start, length]] if start + 4 > length else [[start, start + 2], [start + 3, length]]
    return EncodedRow(rng.integers(0, 500, length).astype(np.int32), np.array(spans, np.int32))


def conversation(number: int) -> Conversation:
    texts = {"system": f"m{number}", "user": "q", "assistant": "a"}
    return Conversation([{"role": role, "content": text} for role, text in texts.items()], None, f":{number}")


@pytest.fixture
def rows() -> list[EncodedRow]:
    rng = np.random.Generator(np.random.PCG64(1))
    return [encoded(rng, 90) for _ in range(120)]


@pytest.fixture
def pairs(rows: list[EncodedRow], tmp_path: Path) -> TokenPairs:
    """40 pairs of one row each in two batches, then 40 rows that are paired with each other at random."""
    numbered = [(conversation(number), [row]) for number, row in enumerate(rows)]
    batches = [
        make_batch(0, numbered[:50], in_pairs=True),
        make_batch(0, numbered[50:80], in_pairs=True),
        make_batch(0, numbered[80:]),
    ]
    write_table(tmp_path / "rows.arrow", batches)
    table = TokenTable([tmp_path / "rows.arrow"], [["f"]], source_names=["f"])
    assert table.conversations.tolist() == [*(number // 2 for number in range(80)), *range(40, 80)]
    siblings = np.random.Generator(np.random.PCG64(2)).permutation(np.arange(80, 120))
    return TokenPairs(table, np.concatenate([np.arange(80), siblings]).reshape(-1, 2))


def halves_by_hand(rows: list[EncodedRow], own: int, other: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of both halves, token by token in plain Python."""
    halves = [list(zip(rows[row].input_ids, rows[row].labels, strict=True)) for row in (own, other)]
    if own >= 80:  # siblings
        starts = [next(at for at, (_, label) in enumerate(half) if label != NOT_TRAINED) for half in halves]
        halves[1] = halves[0][: starts[0]] + halves[1][starts[1] :]
    return [([token for token, _ in half], [label for _, label in half]) for half in halves]


def test_halves_are_the_rows_or_the_prompt_of_one_with_the_answer_of_another(
    rows: list[EncodedRow], pairs: TokenPairs
) -> None:
    assert pairs.is_sibling.tolist() == [False] * 40 + [True] * 20
    for number, (own, other) in enumerate(pairs.rows.tolist()):
        expected = halves_by_hand(rows, own, other)
        for side, ((ids, trained), (tokens, labels)) in enumerate(zip(pairs.halves(number), expected, strict=True)):
            assert (ids.tolist(), EncodedRow(ids, trained).labels) == (tokens, labels)
            assert pairs.lengths[number, side] == len(tokens)
            first = next(at for at, label in enumerate(labels) if label != NOT_TRAINED)
            assert pairs.first_trained[number, side] == first


@pytest.fixture(params=[True, False], ids=["packed", "not packed"])
def dataset(pairs: TokenPairs, request: pytest.FixtureRequest) -> PairDataset:
    capacity = 2 * MAX_LENGTH if request.param else None
    return PairDataset(pairs, MAX_LENGTH, lambda lengths, epoch: plan_packing(lengths, capacity, seed=3, epoch=epoch))


def test_every_pair_is_in_one_sequence_of_each_epoch_with_both_halves(
    rows: list[EncodedRow], pairs: TokenPairs, dataset: PairDataset
) -> None:
    for epoch in (0, 1):
        seen: Counter[int] = Counter()
        for sequence in range(len(dataset)):
            index = epoch * len(dataset) + sequence
            item = dataset[index]
            numbers, places, ends = item["pairs"].tolist(), dataset.places(index), np.cumsum(item["seq_lengths"])
            seen.update(numbers)
            assert item["pairs"].dtype == item["labels"].dtype == item["input_ids"].dtype == np.int64
            assert len(item["seq_lengths"]) == len(places) == len(dataset.sources(index)) == 2 * len(numbers)
            assert len(item["input_ids"]) == len(item["labels"]) == ends[-1] <= 2 * MAX_LENGTH
            assert item["sequence"] == index
            for position, number in enumerate(numbers):
                own, other = pairs.rows[number].tolist()
                assert places[2 * position : 2 * position + 2] == [f"f:{own}", f"f:{other}"]
                for side, (tokens, labels) in enumerate(halves_by_hand(rows, own, other)):
                    end = ends[2 * position + side]
                    document = slice(end - item["seq_lengths"][2 * position + side], end)
                    assert item["input_ids"][document].tolist() == tokens[:MAX_LENGTH]
                    assert item["labels"][document].tolist() == labels[:MAX_LENGTH]
        assert seen == Counter(range(len(pairs)))


def test_a_data_set_counts_pairs_and_has_the_digest_of_its_rows(pairs: TokenPairs, dataset: PairDataset) -> None:
    assert dataset.rows_by_source == {"f": len(pairs)}
    assert dataset.lengths.tolist() == [sum(len(ids) for ids, _ in dataset.pair(number)) for number in range(60)]
    assert [dataset.row(number)[0].tolist() for number in range(60)] == [
        pairs.halves(number)[0][0][:MAX_LENGTH].tolist() for number in range(60)
    ]
    swapped_pairs = TokenPairs(pairs.table, pairs.rows[:, ::-1])
    same, swapped = (
        PairDataset(each, MAX_LENGTH, lambda _, epoch: dataset.plan_of(epoch)) for each in (pairs, swapped_pairs)
    )
    assert dataset.digest() == same.digest() != swapped.digest()


def test_joining_keeps_the_prompt_of_one_and_the_spans_of_the_other() -> None:
    prompt = np.array([1, 2, 3, 4], np.int32), np.array([[2, 4]], np.int32)
    answer = np.array([9, 8, 7, 6, 5, 4], np.int32), np.array([[1, 3], [4, 5]], np.int32)
    ids, trained = join_answer(prompt, answer)
    assert (ids.tolist(), trained.tolist()) == ([1, 2, 8, 7, 6, 5, 4], [[2, 4], [5, 6]])
    assert (ids.dtype, trained.dtype) == (np.int32, np.int32)


def test_the_loss_mask_of_a_sequence_is_that_of_its_halves(dataset: PairDataset, pairs: TokenPairs) -> None:
    trained = sum(int((item["labels"] != NOT_TRAINED).sum()) for item in dataset)
    cut: Callable[[np.ndarray], int] = lambda spans: int(np.diff(np.minimum(spans, MAX_LENGTH)).sum())  # noqa: E731
    assert trained == sum(cut(spans) for number in range(60) for _, spans in pairs.halves(number))
