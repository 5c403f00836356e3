"""In which order sequences are trained: a function of seed and epoch, evened out over the ranks of each step."""

from collections.abc import Iterator

from torch.utils.data import Sampler
from transformers import PreTrainedConfig
from trl import SFTConfig

from train.data.balance import attention_cost, epoch_order, imbalance
from train.data.sequences import Sequences


def linear_tokens(config: PreTrainedConfig) -> float:
    """The length of a document at which attention costs as much as all other layers; see `attention_cost`."""
    return 12.0 * config.get_text_config().hidden_size


class EpochOrder(Sampler[int]):
    """Indices of `Sequences` for one epoch after the other, for all ranks: accelerate deals them out."""

    def __init__(self, sequences: Sequences, arguments: SFTConfig, config: PreTrainedConfig) -> None:
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

    def waiting(self) -> tuple[float, float]:
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
