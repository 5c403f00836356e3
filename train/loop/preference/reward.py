"""Trainer of a reward model: PreferenceTrainer on the rewards of a sequence classifier.

packed row   [ chosen 0 | rejected 0 | chosen 1 | rejected 1 ]
rewards              ^            ^          ^            ^      at the last token of each document
"""

from collections.abc import Sequence
from typing import Any

import torch

from train.data.loss_mask import NOT_TRAINED
from train.loop.loss import MeanMetrics
from train.loop.preference.losses import AnswerScores, PairLosses
from train.loop.preference.pairs import by_pair, tokens_of
from train.loop.preference.trainer import PreferenceTrainer
from train.model.classifier import find_score_head, score_tokens


def find_last_tokens(input_ids: torch.Tensor, of_document: torch.Tensor, padding: int | None) -> torch.Tensor:
    """Return the position of the last token of each document, [documents].

    Padding tokens at its end are skipped, as transformers does: where the padding token is the one that ends an answer,
    it reads the reward at the token before.

    Args:
        input_ids: of a packed row, [1, tokens].
        of_document: which tokens but the first each document has, [documents, tokens - 1].
        padding: the padding token.
    """
    counted = of_document if padding is None else of_document & (input_ids[0, 1:] != padding)
    positions = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    return torch.where(counted, positions, 0).amax(1)


def _mean_rewards(sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics of the sums that `sum_rewards` returns."""
    loss, accurate, chosen, rejected, pairs = sums
    if not pairs:
        return {}
    return {
        "loss": loss / pairs,
        "accuracy": accurate / pairs,
        "margin": (chosen - rejected) / pairs,
        "mean_reward": (chosen + rejected) / (2 * pairs),
    }


REWARD_MEANS = MeanMetrics(5, _mean_rewards)
"""Means over pairs, under the names of TRL's RewardTrainer, without its smallest and largest rewards of a batch."""


def sum_rewards(scores: AnswerScores, losses: PairLosses) -> torch.Tensor:
    """Return the sums of REWARD_MEANS over pairs. Answers without tokens are none: they fill batches."""
    counted = scores.chosen_tokens > 0
    chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
    values = (losses.losses, chosen > rejected, chosen, rejected, counted)
    return torch.stack([value.detach().where(counted, 0).sum(dtype=torch.float64) for value in values])


class RewardTrainer(PreferenceTrainer):
    """PreferenceTrainer on the rewards of a sequence classifier with one label."""

    mean_metrics = REWARD_MEANS

    def _score(
        self, model: torch.nn.Module, inputs: dict[str, Any], documents: torch.Tensor, pairs: int
    ) -> tuple[Any, AnswerScores]:
        """Return no outputs, and the rewards of the answers of a batch."""
        head = find_score_head(self._unwrap())
        assert head is not None  # the model was loaded as a reward model
        of_document = tokens_of(documents, pairs)
        padding = self.model.config.get_text_config().pad_token_id
        last = find_last_tokens(inputs["input_ids"], of_document, padding)
        rewards = score_tokens(model, head, inputs)[0, last]
        return None, by_pair(rewards, of_document & (inputs["labels"][0, 1:] != NOT_TRAINED))

    def _sum(self, outputs: Any, documents: torch.Tensor, scores: AnswerScores, losses: PairLosses) -> torch.Tensor:
        """Return the sums of REWARD_MEANS."""
        return sum_rewards(scores, losses)
