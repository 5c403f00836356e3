"""In which order sequences are trained: a function of seed and epoch, evened out over the ranks of each step."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler
from transformers import PreTrainedConfig
from trl import SFTConfig

from train.data.dataset import PackedDataset
from train.data.packing import PackingPlan


def linear_tokens(config: PreTrainedConfig) -> float:
    """The length of a document at which attention costs as much as all other layers; see `attention_cost`."""
    return 12.0 * config.get_text_config().hidden_size


class BalancedSampler(Sampler[int]):
    """Indices of `PackedDataset` for one epoch after the other, for all ranks: accelerate deals them out."""

    def __init__(self, sequences: PackedDataset, arguments: SFTConfig, config: PreTrainedConfig) -> None:
        """`config`: the model's, whose size tells how attention weighs beside the rest."""
        self._sequences, self._linear_tokens, self._seed = sequences, linear_tokens(config), arguments.seed
        self._ranks, self._batch = arguments.world_size, arguments.train_batch_size
        self._accumulation = arguments.gradient_accumulation_steps
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """What is next iterated over."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(
            self._costs(), ranks=self._ranks, batch=self._batch, accumulation=self._accumulation,
            seed=self._seed, epoch=self._epoch,
        )  # fmt: skip
        first = self._epoch * len(self._sequences)
        return iter((first + order).tolist())

    def epoch_imbalance(self) -> tuple[float, float]:
        """How much longer than without any waiting of ranks an epoch takes: in plain random order, and in this one."""
        costs = self._costs()
        orders = [
            epoch_order(costs, ranks=ranks, batch=batch, accumulation=accumulation, seed=self._seed, epoch=self._epoch)
            for ranks, batch, accumulation in ((1, 1, 1), (self._ranks, self._batch, self._accumulation))
        ]
        plain, dealt = (imbalance(costs, order, ranks=self._ranks, batch=self._batch) for order in orders)
        return plain, dealt

    def _costs(self) -> list[float]:
        plan = self._sequences.plan_of(self._epoch)
        return attention_cost(self._sequences.lengths, plan, self._linear_tokens).tolist()


def attention_cost(lengths: ArrayLike, plan: PackingPlan, linear_tokens: float) -> NDArray[np.float64]:
    """What each sequence costs, float64 [sequences], in tokens' worth of work outside attention.

    A document of n tokens costs n + n**2 / linear_tokens: the linear layers' part, and attention's, which grows with
    the square of the document and doesn't reach over its ends. `lengths`: tokens of each row. `linear_tokens`: the
    document length at which attention costs as much as all the rest. By PaLM's count (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B; nanoGPT's estimate_mfu) a token takes 6 N + 12 L H Q T operations, for N parameters,
    L layers and H heads of size Q; a causal kernel skips half of the second part, so a document takes
    6 N n + 6 L H Q n**2, and linear_tokens = N / (L H Q): about 12 times the hidden size, 54,000 for Mistral 7B.

    Raises ValueError for a `linear_tokens` that isn't above 0.
    """
    if not linear_tokens > 0:
        raise ValueError(f"linear_tokens is {linear_tokens}; it is a number of tokens above 0")
    tokens = np.asarray(lengths, np.float64)[plan.rows]
    return np.add.reduceat(tokens + tokens**2 / linear_tokens, plan.ends[:-1]) if len(plan) else np.empty(0)


def epoch_order(
    costs: ArrayLike, *, ranks: int, batch: int, accumulation: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The sequences of an epoch in the order in which the trainer walks through them: int64 [sequences], a permutation.

    accelerate (BatchSamplerShard) deals an order out as [micro step][rank][batch]; `accumulation` micro steps make an
    optimizer step. Which sequences form a step is uniformly random in (seed, epoch): each step is the same set as in
    the plain random order that `accumulation=1, ranks=1, batch=1` gives, so the gradients are those of plain shuffling.
    Within a step, sequences of like cost share a micro step, are dealt there to the ranks so that their batches cost
    about the same (ranks wait for each other at each micro step under ZeRO-3), and the batches go to the ranks so that
    the totals of the step do (DDP waits once a step). For a batch of one, no other dealing waits less at the micro
    steps. The dearest micro step comes first, so a step that doesn't fit in memory fails early. What is left over at
    the end, less than a micro step of all ranks, stays in random order.

    `costs`: [sequences]. Raises ValueError for counts below 1.
    """
    cost = np.asarray(costs, np.float64)
    together = _sequences_at_once(ranks, batch)
    if accumulation < 1:
        raise ValueError(f"accumulation is {accumulation}; it is 1 or more")
    # PCG64([seed, epoch]) already draws the epoch's packing; the 1 gives a stream of its own
    shuffled = np.argsort(np.random.Generator(np.random.PCG64([seed, epoch, 1])).random(len(cost)), kind="stable")
    of_whole_steps = len(cost) // (together * accumulation) * together * accumulation
    of_whole_micro_steps = len(cost) // together * together
    parts = []
    for start, stop, micro_steps in (
        (0, of_whole_steps, accumulation),
        (of_whole_steps, of_whole_micro_steps, (of_whole_micro_steps - of_whole_steps) // together),
    ):
        if start < stop:
            steps = shuffled[start:stop].reshape(-1, micro_steps * together)
            parts.append(_deal(steps, cost, ranks, batch).reshape(-1))
    return np.concatenate([*parts, shuffled[of_whole_micro_steps:]]).astype(np.int64)


def imbalance(costs: ArrayLike, order: ArrayLike, *, ranks: int, batch: int) -> float:
    """How much longer an epoch takes than if no rank ever waited for another at a micro step; 1.0 = nobody waits.

    The cost of each micro step's slowest rank, summed, by the mean over the ranks, summed. Where the sequences don't
    fill the last micro step, accelerate (even_batches) starts over from the front of the order, and so does this.
    `costs`: [sequences]; `order`: [sequences], as from `epoch_order`. Raises ValueError for counts below 1.
    """
    cost, walked = np.asarray(costs, np.float64), np.asarray(order, np.int64)
    together = _sequences_at_once(ranks, batch)
    if not len(walked):
        return 1.0
    filled = np.resize(walked, -(-len(walked) // together) * together)
    of_rank = cost[filled].reshape(-1, ranks, batch).sum(axis=2)
    return float(of_rank.max(axis=1).sum() / of_rank.mean(axis=1).sum())


def _sequences_at_once(ranks: int, batch: int) -> int:
    if ranks < 1 or batch < 1:
        raise ValueError(f"{ranks} ranks with batches of {batch}: both are 1 or more")
    return ranks * batch


def _deal(steps: NDArray[np.int64], cost: NDArray[np.float64], ranks: int, batch: int) -> NDArray[np.int64]:
    """The sequences of each step [steps, sequences], dealt to [steps, micro step, rank, batch]."""
    dearest_first = np.take_along_axis(steps, np.argsort(-cost[steps], axis=1, kind="stable"), axis=1)
    rounds = dearest_first.reshape(len(steps), -1, batch, ranks)  # one sequence for each rank in each of batch rounds
    # within a micro step: the dearest sequence of a round to the batch that has cost least so far
    batches = np.empty((*rounds.shape[:2], ranks, batch), np.int64)
    of_batch = np.zeros((*rounds.shape[:2], ranks))
    for place in range(batch):
        cheapest = np.argsort(of_batch, axis=2, kind="stable")
        np.put_along_axis(batches[..., place], cheapest, rounds[:, :, place], axis=2)
        of_batch += cost[batches[..., place]]
    # over the micro steps: the dearest batch to the rank that has cost least so far
    dealt = np.empty_like(batches)
    of_rank = np.zeros((len(steps), ranks))
    for micro_step in range(rounds.shape[1]):
        dearest = np.argsort(-of_batch[:, micro_step], axis=1, kind="stable")
        cheapest = np.argsort(of_rank, axis=1, kind="stable")
        chosen = np.take_along_axis(batches[:, micro_step], dearest[..., None], axis=1)
        np.put_along_axis(dealt[:, micro_step], np.broadcast_to(cheapest[..., None], chosen.shape), chosen, axis=1)
        of_rank += cost[dealt[:, micro_step]].sum(axis=2)
    return dealt
