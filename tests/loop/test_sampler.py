"""Order of training: the same steps as plain shuffling, balanced over the ranks."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from train.data.packing import plan_packing
from train.loop.sampler import SharedBatches, attention_cost, epoch_order, imbalance

COUNTS = {"ranks": st.integers(1, 4), "batch": st.integers(1, 3), "accumulation": st.integers(1, 3)}


def plain(sequences: int, seed: int, epoch: int) -> list[int]:
    """Return the random order before balancing: one sequence per step leaves nothing to balance."""
    return epoch_order([1.0] * sequences, ranks=1, batch=1, accumulation=1, seed=seed, epoch=epoch).tolist()


def dealt(order: list[int], ranks: int, batch: int) -> list[list[list[int]]]:
    """Return accelerate's batches of an order: [micro step][rank][batch]."""
    shards = [
        list(BatchSamplerShard(BatchSampler(order, batch, drop_last=False), ranks, rank, even_batches=True))
        for rank in range(ranks)
    ]
    return [list(micro_step) for micro_step in zip(*shards, strict=True)]


def cost_of_waiting(costs: list[float], micro_steps: list[list[list[int]]]) -> float:
    return sum(max(sum(costs[sequence] for sequence in batch) for batch in ranks) for ranks in micro_steps)


@given(costs=st.lists(st.floats(0, 1e6)), seed=st.integers(0, 5), epoch=st.integers(0, 3), **COUNTS)
def test_an_order_is_a_permutation_whose_steps_are_those_of_the_plain_random_order(
    costs: list[float], seed: int, epoch: int, ranks: int, batch: int, accumulation: int
) -> None:
    order = epoch_order(costs, ranks=ranks, batch=batch, accumulation=accumulation, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    random_order = plain(len(costs), seed, epoch)
    of_step = ranks * batch * accumulation
    for start in range(0, max(len(costs), 1), of_step):
        assert sorted(order[start : start + of_step]) == sorted(random_order[start : start + of_step])
    again = epoch_order(costs, ranks=ranks, batch=batch, accumulation=accumulation, seed=seed, epoch=epoch)
    assert order.tolist() == again.tolist()


def test_every_sequence_is_equally_likely_at_each_position_and_epochs_and_seeds_differ() -> None:
    firsts = [plain(4, 0, epoch)[0] for epoch in range(4_000)]
    assert all(900 < firsts.count(sequence) < 1_100 for sequence in range(4))
    orders = {tuple(plain(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=40), **COUNTS)
def test_imbalance_is_that_of_accelerates_batches(
    costs: list[float], ranks: int, batch: int, accumulation: int
) -> None:
    order = epoch_order(costs, ranks=ranks, batch=batch, accumulation=accumulation, seed=0, epoch=0)
    micro_steps = dealt(order.tolist(), ranks, batch)
    working = sum(costs[sequence] for ranks_ in micro_steps for batch_ in ranks_ for sequence in batch_) / ranks
    expected = cost_of_waiting(costs, micro_steps) / working
    assert imbalance(costs, order, ranks=ranks, batch=batch) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (2, 2), (2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_order_of_single_sequences_waits_less(ranks: int, accumulation: int, seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.lognormvariate(0, 1) for _ in range(ranks * accumulation)]
    order = epoch_order(costs, ranks=ranks, batch=1, accumulation=accumulation, seed=seed, epoch=0).tolist()
    least = min(
        cost_of_waiting(costs, dealt(list(any_), ranks, 1)) for any_ in itertools.permutations(range(len(costs)))
    )
    assert cost_of_waiting(costs, dealt(order, ranks, 1)) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(10))
def test_batches_of_several_sequences_wait_closer_to_the_minimum_than_to_the_mean(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.lognormvariate(0, 0.5) for _ in range(8)]
    order = epoch_order(costs, ranks=2, batch=2, accumulation=2, seed=seed, epoch=0).tolist()
    every = [cost_of_waiting(costs, dealt(list(any_), 2, 2)) for any_ in itertools.permutations(range(8))]
    assert cost_of_waiting(costs, dealt(order, 2, 2)) <= min(every) + 0.5 * (np.mean(every) - min(every))


def test_the_ranks_totals_over_a_step_are_balanced() -> None:
    rng = random.Random(0)
    costs = [rng.lognormvariate(0, 1) for _ in range(8 * 16)]

    def spread(order: list[int]) -> float:
        totals = [sum(costs[sequence] for step in dealt(order, 8, 1) for sequence in step[rank]) for rank in range(8)]
        return max(totals) / min(totals)

    assert spread(epoch_order(costs, ranks=8, batch=1, accumulation=16, seed=0, epoch=0).tolist()) < 1.25
    assert spread(plain(len(costs), 0, 0)) > 1.5


def test_a_long_context_waits_less_than_in_random_order() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(8, 1.2, 4_000), 16, 65_536).astype(int)
    packed = plan_packing(lengths, 65_536, multiple_of=8)
    costs = attention_cost(lengths, packed, linear_tokens=54_000)
    before = imbalance(costs, plain(len(packed), 0, 0), ranks=8, batch=1)
    balanced = epoch_order(costs, ranks=8, batch=1, accumulation=4, seed=0, epoch=0)
    assert imbalance(costs, balanced, ranks=8, batch=1) - 1 < 0.5 * (before - 1)


def test_a_documents_cost_is_linear_plus_quadratic_and_ends_at_its_border() -> None:
    packed = plan_packing([6, 4, 10, 3], 10, seed=0)
    costs = attention_cost([6, 4, 10, 3], packed, linear_tokens=5)
    of_row = [6 + 36 / 5, 4 + 16 / 5, 10 + 100 / 5, 3 + 9 / 5]
    assert costs.tolist() == pytest.approx([sum(of_row[row] for row in packed[place]) for place in range(len(packed))])
    assert attention_cost([], plan_packing([], 10), linear_tokens=5).tolist() == []
    with pytest.raises(ValueError, match="linear_tokens"):
        attention_cost([6, 4, 10, 3], packed, linear_tokens=0)


@pytest.mark.parametrize("counts", [{"ranks": 0}, {"batch": 0}, {"accumulation": 0}])
def test_counts_below_one_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        epoch_order([1.0], **{"ranks": 1, "batch": 1, "accumulation": 1, "seed": 0, "epoch": 0, **counts})


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize(("groups", "batch"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("sequences", [3, 12, 17])
def test_ranks_that_share_sequences_get_the_batches_of_one(
    sequences: int, groups: int, batch: int, copies: int, drop_last: bool
) -> None:
    """accelerate gives each rank of a group what it gives one rank in its place."""
    arguments = SimpleNamespace(world_size=groups * copies, dataloader_drop_last=drop_last)
    order = [sequence * 7 % sequences for sequence in range(sequences)]
    shared = SharedBatches(order, batch, copies, arguments)
    assert len(shared) == len(list(shared))

    def batches(sampler: object, ranks: int, rank: int) -> list[list[int]]:
        return list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last), ranks, rank))

    for rank in range(groups * copies):
        assert batches(shared, groups * copies, rank) == batches(order, groups, rank // copies)
