"""Pairs of a batch: the documents of a packed batch, the log-probabilities of their answers, and sums for the metrics.

documents     [ chosen 0 | rejected 0 | chosen 1 | rejected 1 ]      documents 0 and 2 are chosen, 1 and 3 rejected
labels          .  c  c    .  r  r      .  c       .  r  r  r        only answers are trained
log-probs          l  l       l  l         l          l  l  l        [1, tokens - 1], 0 where not trained
answers       [ l + l,    l + l,        l,         l + l + l ]       [documents] -> chosen and rejected [pairs]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from train.data.loss_mask import NOT_TRAINED
from train.loop.batch_info import BATCH_INFO, CountingCollator
from train.loop.loss import MeanMetrics
from train.loop.preference.losses import AnswerScores, PairLosses

PAIRS = "pairs"
"""Key of the numbers of a batch's pairs, int64 [pairs]."""
DOCUMENTS = "documents"
"""Key of the document that each predicted token belongs to, int64 [tokens - 1]."""


class PairCollator(CountingCollator):
    """A CountingCollator that adds PAIRS and DOCUMENTS. Rows of a batch are joined without padding."""

    def collate_whole(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the complete batch with its BatchInfo; without numbers of pairs where the documents are none."""
        batch = super().collate_whole(examples)
        if PAIRS not in examples[0]:
            return batch
        lengths = batch[BATCH_INFO].documents
        documents = np.zeros(batch["labels"].shape[1] - 1, np.int64)  # padding has no labels
        documents[: lengths.sum() - 1] = np.repeat(np.arange(len(lengths)), lengths)[1:]
        pairs = np.concatenate([example[PAIRS] for example in examples]).astype(np.int64)
        return {**batch, PAIRS: torch.from_numpy(pairs), DOCUMENTS: torch.from_numpy(documents)}


def count_items(batch: dict[str, Any]) -> torch.Tensor:
    """Return the numbers of pairs and of trained tokens of chosen answers of a batch: int64 [2]."""
    chosen = (batch["labels"][0, 1:] != NOT_TRAINED) & (batch[DOCUMENTS] % 2 == 0)
    tokens = chosen.sum()
    return torch.stack([torch.full_like(tokens, len(batch[PAIRS])), tokens])


def score_answers(outputs: Any, documents: torch.Tensor, pairs: int) -> AnswerScores:
    """Return the log-probabilities of the answers of a batch.

    Args:
        outputs: of TRL's fused head, whose fields are [1, tokens - 1] and 0 where a token has no label.
        documents: the document of each of these tokens, [tokens - 1].
        pairs: their number.
    """
    # no index_add_: on a GPU it adds in another order each time, and a resumed run is bit-identical
    of_document = tokens_of(documents, pairs)
    sums = torch.where(of_document, outputs.log_probs[0], 0).sum(1)
    return by_pair(sums, of_document & outputs.label_mask[0])


def tokens_of(documents: torch.Tensor, pairs: int) -> torch.Tensor:
    """Return which predicted tokens each document has, [documents, tokens - 1]."""
    return documents == torch.arange(2 * pairs, device=documents.device)[:, None]


def by_pair(scores: torch.Tensor, trained: torch.Tensor) -> AnswerScores:
    """Return scores [documents] by pair. `trained`: the trained tokens of each document, [documents, tokens - 1]."""
    tokens, first = trained.sum(1), trained[0::2].int().argmax(1)
    return AnswerScores(scores[0::2], scores[1::2], tokens[0::2], tokens[1::2], first)


def place_losses(losses: PairLosses, scores: AnswerScores, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair at the first trained token of its chosen answer, and where that is.

    Both are [1, tokens]: those that are predicted. So means over tokens are means over pairs.
    """
    counted = scores.chosen_tokens > 0
    nll = -scores.chosen / scores.chosen_tokens.clamp(min=1)
    values = (losses.losses + losses.nll_weight * nll).detach().where(counted, 0)
    nowhere = values.new_zeros(1, tokens)
    placed = nowhere.scatter_add(1, scores.first_token[None], values[None])
    has_loss = nowhere.scatter_add(1, scores.first_token[None], counted.to(values.dtype)[None])
    return placed, has_loss > 0


def _mean_pairs(sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics of the sums that `sum_pairs` returns. Answers without tokens are none: they fill batches."""
    loss, nll, chosen_reward, rejected_reward, accurate, chosen, rejected, correct, entropy, *counts = sums
    pairs, chosen_tokens, tokens = counts
    if not pairs:
        return {}
    return {
        "loss": loss / pairs + nll / chosen_tokens,
        "rewards/chosen": chosen_reward / pairs,
        "rewards/rejected": rejected_reward / pairs,
        "rewards/accuracies": accurate / pairs,
        "rewards/margins": (chosen_reward - rejected_reward) / pairs,
        "logps/chosen": chosen / pairs,
        "logps/rejected": rejected / pairs,
        "entropy": entropy / tokens,
        "mean_token_accuracy": correct / chosen_tokens,
    }


PAIR_METRICS = MeanMetrics(12, _mean_pairs)
"""Means over pairs, under TRL's names; the entropy is one over tokens, the accuracy over those of chosen answers."""


def sum_pairs(outputs: Any, documents: torch.Tensor, scores: AnswerScores, losses: PairLosses) -> torch.Tensor:
    """Return the sums of PAIR_METRICS. Arguments: as of `score_answers`, and what was computed from them."""
    counted = scores.chosen_tokens > 0  # a pair without tokens fills a batch
    better = losses.chosen_rewards > losses.rejected_rewards
    rewards, log_probs = losses[2:4], losses[4:]
    of_pairs = (losses.losses, *rewards, better, *log_probs)
    loss, *others = (value.detach().where(counted, 0).sum(dtype=torch.float64) for value in of_pairs)
    nll = -losses.nll_weight * scores.chosen.detach().sum(dtype=torch.float64)
    correct = (outputs.is_top1[0] & outputs.label_mask[0] & (documents % 2 == 0)).sum()
    counts = (counted.sum(), scores.chosen_tokens.sum(), outputs.label_mask.sum())
    entropy = outputs.entropy.detach().sum(dtype=torch.float64)
    return torch.stack([value.double() for value in (loss, nll, *others, correct, entropy, *counts)])
