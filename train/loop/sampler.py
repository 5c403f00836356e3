"""Order of training: a function of seed and epoch that balances the ranks of each step."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.distributed import ProcessGroup
from torch.utils.data import Sampler
from transformers import PreTrainedConfig
from trl import SFTConfig

from train.data.dataset import PackedDataset
from train.data.packing import PackingPlan


def linear_tokens(config: PreTrainedConfig) -> float:
    """Return the document length at which attention costs as much as all other layers; see `attention_cost`."""
    return 12.0 * config.get_text_config().hidden_size


class BalancedSampler(Sampler[int]):
    """Indices of `PackedDataset` for all ranks, epoch by epoch; accelerate distributes them."""

    def __init__(self, sequences: PackedDataset, arguments: SFTConfig, config: PreTrainedConfig, *, ranks: int) -> None:
        """Begin at epoch 0.

        - `config`: the model's, whose size decides the cost of attention;
        - `ranks`: ranks, or groups of ranks, that take sequences of their own.
        """
        self._sequences, self._linear_tokens, self._seed = sequences, linear_tokens(config), arguments.seed
        self._ranks, self._batch = ranks, arguments.train_batch_size
        self._accumulation = arguments.gradient_accumulation_steps
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
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
        """Return the imbalance of an epoch (see `imbalance`): in plain random order, and in this order."""
        costs = self._costs()
        orders = [
            epoch_order(costs, ranks=ranks, batch=batch, accumulation=accumulation, seed=self._seed, epoch=self._epoch)
            for ranks, batch, accumulation in ((1, 1, 1), (self._ranks, self._batch, self._accumulation))
        ]
        plain, balanced = (imbalance(costs, order, ranks=self._ranks, batch=self._batch) for order in orders)
        return plain, balanced

    def _costs(self) -> list[float]:
        plan = self._sequences.plan_of(self._epoch)
        return attention_cost(self._sequences.lengths, plan, self._linear_tokens).tolist()


class SharedBatches(Sampler[int]):
    """The batches of another sampler, each as often as ranks share its sequences (sequence parallelism).

    order            a b | c d | e           batches of two
    repeated         a b | a b | c d | c d | e a | e a | b c | b c       two ranks for each, in two groups

    accelerate (BatchSamplerShard) gives consecutive batches to consecutive ranks. The last micro step is filled from
    the front of the order, as accelerate would, or left out.
    """

    def __init__(self, sampler: Sampler[int], batch: int, copies: int, arguments: SFTConfig) -> None:
        """`batch`: sequences of a rank. `copies`: ranks that share them."""
        self._sampler, self._batch, self._copies = sampler, batch, copies
        self._drop_last = arguments.dataloader_drop_last
        self._together = arguments.world_size // self._copies * batch

    def __len__(self) -> int:
        sequences = len(self._sampler)  # type: ignore[arg-type]
        steps = sequences // self._together if self._drop_last else -(-sequences // self._together)
        return steps * self._together * self._copies

    def __iter__(self) -> Iterator[int]:
        order = np.resize(np.fromiter(self._sampler, np.int64), len(self) // self._copies)
        return iter(order.reshape(-1, self._batch).repeat(self._copies, axis=0).ravel().tolist())


def share_batches(
    sampler: Sampler[int] | None, batch: int, group: ProcessGroup | None, arguments: SFTConfig
) -> Sampler[int] | None:
    """Return a sampler whose batches of `batch` sequences all ranks of `group` get; `sampler` itself without one."""
    return sampler if sampler is None or group is None else SharedBatches(sampler, batch, group.size(), arguments)


def attention_cost(lengths: ArrayLike, plan: PackingPlan, linear_tokens: float) -> NDArray[np.float64]:
    """Return the cost of each sequence, float64 [sequences], in units of a token's work outside attention.

    A document of n tokens costs n + n**2 / linear_tokens: the linear layers, and attention, which grows with the square
    of the document and ends at its borders. `lengths`: tokens of each row. `linear_tokens`: the
    document length at which attention costs as much as all the rest. By PaLM's count (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B; nanoGPT's estimate_mfu) a token takes 6 N + 12 L H Q T operations, for N parameters,
    L layers and H heads of size Q; a causal kernel skips half of the second part, so a document takes
    6 N n + 6 L H Q n**2, and linear_tokens = N / (L H Q): about 12 times the hidden size, 54,000 for Mistral 7B.

    Raises ValueError unless `linear_tokens` > 0.
    """
    if not linear_tokens > 0:
        raise ValueError(f"linear_tokens must be > 0, not {linear_tokens}")
    tokens = np.asarray(lengths, np.float64)[plan.rows]
    return np.add.reduceat(tokens + tokens**2 / linear_tokens, plan.ends[:-1]) if len(plan) else np.empty(0)


def epoch_order(
    costs: ArrayLike, *, ranks: int, batch: int, accumulation: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the order of an epoch's sequences: int64 [sequences], a permutation.

    accelerate (BatchSamplerShard) reads it as [micro step][rank][batch]; `accumulation` micro steps are an optimizer
    step.

    - Across steps: uniformly random in (seed, epoch). Each step has the same set of sequences as in the plain random
      order of `accumulation=1, ranks=1, batch=1`, so gradients are those of plain shuffling.
    - Within a step: sequences of similar cost share a micro step, are distributed there so that the batches cost about
      the same (ranks wait for each other at each micro step under ZeRO-3), and the batches go to the ranks so that the
      totals of the step do (DDP waits once a step). For batches of one, no other order waits less at the micro steps.
    - The most expensive micro step comes first, so that a step that exceeds the memory fails early.
    - The remainder, less than a micro step of all ranks, stays in random order.

    `costs`: [sequences]. Raises ValueError for counts below 1.
    """
    cost = np.asarray(costs, np.float64)
    together = _sequences_at_once(ranks, batch)
    if accumulation < 1:
        raise ValueError(f"accumulation must be >= 1, not {accumulation}")
    # PCG64([seed, epoch]) generates the epoch's packing; the 1 selects another stream
    shuffled = np.argsort(np.random.Generator(np.random.PCG64([seed, epoch, 1])).random(len(cost)), kind="stable")
    in_full_steps = len(cost) // (together * accumulation) * together * accumulation
    in_full_micro_steps = len(cost) // together * together
    parts = []
    for start, stop, micro_steps in (
        (0, in_full_steps, accumulation),
        (in_full_steps, in_full_micro_steps, (in_full_micro_steps - in_full_steps) // together),
    ):
        if start < stop:
            steps = shuffled[start:stop].reshape(-1, micro_steps * together)
            parts.append(_balance(steps, cost, ranks, batch).reshape(-1))
    return np.concatenate([*parts, shuffled[in_full_micro_steps:]]).astype(np.int64)


def imbalance(costs: ArrayLike, order: ArrayLike, *, ranks: int, batch: int) -> float:
    """Return the duration of an epoch relative to one without waiting at micro steps; 1.0 = no rank waits.

    The sum over micro steps of the slowest rank's cost, divided by that of the mean cost. The last micro step is filled
    from the front of the order, as accelerate does (even_batches).
    `costs`: [sequences]; `order`: [sequences], as from `epoch_order`. Raises ValueError for counts below 1.
    """
    cost, sequences = np.asarray(costs, np.float64), np.asarray(order, np.int64)
    together = _sequences_at_once(ranks, batch)
    if not len(sequences):
        return 1.0
    filled = np.resize(sequences, -(-len(sequences) // together) * together)
    of_rank = cost[filled].reshape(-1, ranks, batch).sum(axis=2)
    return float(of_rank.max(axis=1).sum() / of_rank.mean(axis=1).sum())


def _sequences_at_once(ranks: int, batch: int) -> int:
    if ranks < 1 or batch < 1:
        raise ValueError(f"{ranks} ranks with batches of {batch}: both must be >= 1")
    return ranks * batch


def _balance(steps: NDArray[np.int64], cost: NDArray[np.float64], ranks: int, batch: int) -> NDArray[np.int64]:
    """Return the sequences of each step [steps, sequences], balanced as [steps, micro step, rank, batch]."""
    expensive_first = np.take_along_axis(steps, np.argsort(-cost[steps], axis=1, kind="stable"), axis=1)
    rounds = expensive_first.reshape(len(steps), -1, batch, ranks)  # `batch` rounds of one sequence for each rank
    # within a micro step: the most expensive sequence of a round goes to the cheapest batch so far
    batches = np.empty((*rounds.shape[:2], ranks, batch), np.int64)
    of_batch = np.zeros((*rounds.shape[:2], ranks))
    for position in range(batch):
        cheapest = np.argsort(of_batch, axis=2, kind="stable")
        np.put_along_axis(batches[..., position], cheapest, rounds[:, :, position], axis=2)
        of_batch += cost[batches[..., position]]
    # over the micro steps: the most expensive batch goes to the cheapest rank so far
    balanced = np.empty_like(batches)
    of_rank = np.zeros((len(steps), ranks))
    for micro_step in range(rounds.shape[1]):
        expensive = np.argsort(-of_batch[:, micro_step], axis=1, kind="stable")
        cheapest = np.argsort(of_rank, axis=1, kind="stable")
        chosen = np.take_along_axis(batches[:, micro_step], expensive[..., None], axis=1)
        np.put_along_axis(balanced[:, micro_step], np.broadcast_to(cheapest[..., None], chosen.shape), chosen, axis=1)
        of_rank += cost[balanced[:, micro_step]].sum(axis=2)
    return balanced
