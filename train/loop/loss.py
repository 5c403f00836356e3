"""Token losses of TRL's fused head: the loss of a micro-batch, and its sums for the metrics.

tokens                 1    2    3    4   |  5    6    7        two packed documents, | = border
labels                -100 -100  3    4   | -100  6    7        -100 = not trained
losses                      0    l3   l4  |  0    l6   l7       [rows, tokens - 1], 0 where not trained
loss                  (l3 + l4 + l6 + l7) / trained tokens of the optimizer step, on all processes
"""

from typing import Any, NamedTuple

import torch
from trl import SFTConfig

FUSED_LOSSES = ("nll", "dft")
"""Values of `loss_type` that need only the probability of each label."""


class LossSums(NamedTuple):
    """Sums over the tokens that have a loss, on the device: losses and entropies in nats, correct top-1 predictions,
    tokens."""

    loss: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def from_outputs(outputs: Any) -> "LossSums":
        """Return the sums of TRL's fused head, whose fields are 0 where a token has no loss."""
        values = (-outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask)
        return LossSums(*(value.detach().sum(dtype=torch.float64) for value in values))

    def plus(self, other: "LossSums | None") -> "LossSums":
        """Return the sums of both."""
        return self if other is None else LossSums(*(left + right for left, right in zip(self, other, strict=True)))


def fused_loss(
    outputs: Any, arguments: SFTConfig, num_items_in_batch: torch.Tensor | int | None, processes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a micro-batch, and the losses of its tokens in nats [rows, tokens - 1].

    Args:
        outputs: of a model with `fused_lm_head=True`.
        arguments: their `loss_type` is one of FUSED_LOSSES.
        num_items_in_batch: trained tokens of the optimizer step; None = those of the micro-batch.
        processes: processes over which gradients are averaged.
    """
    losses = -outputs.log_probs  # 0 where a token has none
    if arguments.loss_type == "dft":  # arXiv:2508.05629
        losses = losses * outputs.log_probs.exp().detach()
    tokens = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
    loss = losses.sum() / torch.as_tensor(tokens).clamp(min=1)
    if num_items_in_batch is not None and arguments.average_tokens_across_devices:
        # the tokens are those of all processes, and DDP takes the mean of their gradients
        loss = loss * processes
    return loss, losses
