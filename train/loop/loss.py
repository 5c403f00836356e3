"""Token losses of TRL's fused head: the loss of a micro-batch, and its sums for the metrics.

tokens                 1    2    3    4   |  5    6    7        two packed documents, | = border
labels                -100 -100  3    4   | -100  6    7        -100 = not trained
losses                      0    l3   l4  |  0    l6   l7       [rows, tokens - 1], 0 where not trained
loss                  (l3 + l4 + l6 + l7) / trained tokens of the optimizer step, on all processes
with loss weights     (w3 l3 + w4 l4 + w6 l6 + w7 l7) / sum of the weights w of the optimizer step, on all processes
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from train.data.prepared_data import PreparedData
from train.errors import UserError
from train.recipe.sft_config import TOKEN_LOSSES

LOGITS_LIMIT = 2**28
"""Logits that a CPU computes at once: 1 GiB in float32."""


class MeanMetrics(NamedTuple):
    """Metrics that are quotients of sums: the sums of micro-batches and of processes are added, and divided at last.

    - `sums`: number of sums, float64 [sums] on the device.
    - `means`: returns the metrics by their names in the log; none if nothing was counted.
    """

    sums: int
    means: Callable[[Sequence[float]], dict[str, float]]


def sum_losses(outputs: Any, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return sums over the tokens that have a loss: losses and entropies in nats, correct top-1 predictions, tokens,
    loss weights. Only the losses are weighted.

    Args:
        outputs: of TRL's fused head, whose fields are 0 where a token has no loss.
        weights: loss weights, of the same shape; None = 1.
    """
    losses = -outputs.log_probs if weights is None else -outputs.log_probs * weights
    counted = outputs.label_mask if weights is None else weights
    values = (losses, outputs.entropy, outputs.is_top1, outputs.label_mask, counted)
    return torch.stack([value.detach().sum(dtype=torch.float64) for value in values])


def _mean_losses(sums: Sequence[float]) -> dict[str, float]:
    loss, entropy, correct, tokens, weights = sums
    if not weights:
        return {}
    return {"loss": loss / weights, "entropy": entropy / tokens, "mean_token_accuracy": correct / tokens}


TOKEN_METRICS = MeanMetrics(5, _mean_losses)
"""Means over tokens: those of `sum_losses`."""


def needs_logits(trainer: SFTTrainer) -> bool:
    """Return whether the loss needs more than the probabilities of the labels, so that TRL computes it."""
    return (
        trainer.aux_loss_enabled
        or trainer.label_smoother is not None
        or trainer.compute_loss_func is not None
        or trainer.args.loss_type not in TOKEN_LOSSES
    )


def check_weighable(trainer: SFTTrainer, data: PreparedData) -> None:
    """Raise UserError if rows have loss weights and TRL computes the loss.

    For keys of the recipe alone `train.data.diagnostics` does so; here a mixture of experts is left.
    """
    if needs_logits(trainer) and any(stats.rows_with_loss_weight for stats in data.stats.values()):
        raise UserError(
            "training.router_aux_loss_coef: TRL computes the loss of a mixture of experts with its auxiliary loss, and "
            "without the loss weights that rows have. Write 0, or remove the weights."
        )


def score_labels(model: torch.nn.Module, unwrapped: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """Return the outputs of TRL's fused head, whose fields are [rows, tokens - 1] and 0 where a token has no label.

    On a CPU TRL computes the logits of all tokens, in pieces. There the model computes those of tokens with a label
    alone, if they fit into LOGITS_LIMIT.

    Args:
        model: as it is called; `unwrapped`: without the wrappers of DDP and DeepSpeed.
        inputs: arguments of the model, with `labels` [rows, tokens]; with `shift_labels` [rows, tokens] too if the rows
            are parts of a sequence that processes share: the last token of a part is scored as well, by TRL's head.
    """
    kept = None
    if inputs["input_ids"].device.type == "cpu" and "shift_labels" not in inputs:
        labels = inputs["labels"][:, 1:]
        has_label = labels != -100
        kept = has_label.any(dim=0).nonzero().squeeze(1)  # positions at which any row has one
    language_model = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
    if kept is None or not _computes_part_of_logits(language_model, len(labels) * len(kept)):
        return model(**inputs, use_cache=False, fused_lm_head=True)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**others, use_cache=False, logits_to_keep=kept).logits.float()  # [rows, kept, vocabulary]
    log_softmax = logits.log_softmax(dim=-1)
    targets = labels[:, kept].clamp(min=0)
    scores = {"log_probs": log_softmax.gather(2, targets.unsqueeze(2)).squeeze(2)}
    with torch.no_grad():
        scores["entropy"] = -(log_softmax.exp() * log_softmax).sum(dim=-1)
        scores["is_top1"] = logits.argmax(dim=-1) == targets
    fields = {
        name: values.new_zeros(labels.shape).index_copy(1, kept, values).masked_fill(~has_label, 0)
        for name, values in scores.items()
    }
    return FusedCausalLMOutput(**fields, label_mask=has_label)


def _computes_part_of_logits(language_model: Any, tokens: int) -> bool:
    """Return whether the model's forward pass can compute logits of chosen tokens, and whether those of so many fit."""
    fits = tokens * language_model.config.get_text_config().vocab_size <= LOGITS_LIMIT
    return fits and "logits_to_keep" in signature(language_model.forward).parameters


def fused_loss(
    outputs: Any,
    arguments: SFTConfig,
    num_items_in_batch: torch.Tensor | int | None,
    processes: int,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a micro-batch, and the losses of its tokens in nats [rows, tokens - 1], not weighted.

    Args:
        outputs: of a model with `fused_lm_head=True`.
        arguments: their `loss_type` is one of TOKEN_LOSSES.
        num_items_in_batch: trained tokens of the optimizer step, or the sum of their loss weights; None = those of the
            micro-batch.
        processes: processes over which gradients are averaged.
        weights: loss weights of the tokens [rows, tokens - 1], 0 where a token has no loss; None = 1.
    """
    losses = -outputs.log_probs  # 0 where a token has none
    if arguments.loss_type == "dft":  # arXiv:2508.05629
        losses = losses * outputs.log_probs.exp().detach()
    counted = outputs.label_mask if weights is None else weights
    divisor = torch.as_tensor(counted.sum() if num_items_in_batch is None else num_items_in_batch)
    loss = (losses if weights is None else losses * weights).sum() / divisor.where(divisor > 0, 1)
    if num_items_in_batch is not None and arguments.average_tokens_across_devices:
        # the divisor is of all processes, and DDP takes the mean of their gradients
        loss = loss * processes
    return loss, losses
