"""Losses of preference training: of pairs of answers to the same prompt, the chosen one and the rejected one.

log-probabilities   c, r: sums over the trained tokens of the chosen and of the rejected answer; c0, r0: the reference's
log-ratios          x = c - c0, y = r - r0
DPO                 sigmoid: -log sigmoid(beta (x - y)), arXiv:2305.18290
ORPO                NLL of the chosen answer - beta log sigmoid(log odds(chosen) - log odds(rejected)), arXiv:2403.07691
reward model        -log sigmoid(c - r) + centering (c + r)^2, arXiv:2203.02155 and 2312.09244; c, r: rewards of the two

The names are those of TRL's DPOConfig.loss_type, ORPOConfig and RewardConfig. The loss of an optimizer step is a mean
over its pairs; the negative log-likelihood of ORPO and of `sft` is one over the trained tokens of its chosen answers,
as TRL's is over those of a batch. TRL's ORPO adds the tokens of the prompt, which are not trained here.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from train.recipe.preference import PreferenceSection


class AnswerScores(NamedTuple):
    """Scores of the answers of pairs, and numbers of their trained tokens: [pairs].

    A score is the sum of an answer's log-probabilities; of a reward model its reward.
    `first_token`: position of the first trained token of the chosen answer in the batch.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    first_token: torch.Tensor


class PairLosses(NamedTuple):
    """Losses of pairs.

    - `losses`: [pairs], without the negative log-likelihood of the chosen answers.
    - `nll_weight`: weight of that.
    - `chosen_rewards`, `rejected_rewards`: [pairs], without gradients.
    - `chosen_logps`, `rejected_logps`: log-probabilities for the metrics, [pairs]: those of answers, ORPO's of tokens;
      of a reward model the rewards again.
    """

    losses: torch.Tensor
    nll_weight: float
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor


def compute_losses(section: PreferenceSection, scores: AnswerScores, reference: torch.Tensor | None) -> PairLosses:
    """Return the losses that the recipe names.

    `reference`: the reference's log-probabilities of the answers, chosen and rejected: [pairs, 2]; for DPO alone.
    """
    if section.loss == "reward":
        return _reward(scores, section.center_rewards_coefficient or 0.0)
    if section.loss == "orpo":
        return _orpo(scores, section.beta)
    assert reference is not None
    chosen, rejected = scores.chosen - reference[:, 0], scores.rejected - reference[:, 1]
    losses, nll_weight = torch.zeros_like(scores.chosen), 0.0
    weights = section.loss_weights or [1.0] * len(section.loss_type)
    for name, weight in zip(section.loss_type, weights, strict=True):
        if name == "sft":
            nll_weight += weight
        else:
            losses = losses + weight * _dpo(name, chosen, rejected, scores, section)
    return PairLosses(
        losses,
        nll_weight,
        chosen_rewards=section.beta * chosen.detach(),
        rejected_rewards=section.beta * rejected.detach(),
        chosen_logps=scores.chosen.detach(),
        rejected_logps=scores.rejected.detach(),
    )


def _dpo(
    name: str, chosen: torch.Tensor, rejected: torch.Tensor, scores: AnswerScores, section: PreferenceSection
) -> torch.Tensor:
    """Return the losses of a type, [pairs]. `chosen`, `rejected`: log-ratios."""
    beta = section.beta
    margins = beta * (chosen - rejected)
    match name:
        case "sigmoid":
            return -logsigmoid(margins)
        case "hinge":
            return torch.relu(1 - margins)
        case "robust":  # arXiv:2403.00409
            flipped = section.label_smoothing
            return ((flipped - 1) * logsigmoid(margins) + flipped * logsigmoid(-margins)) / (1 - 2 * flipped)
        case "apo_zero":  # arXiv:2408.06266
            return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":
            return torch.sigmoid(beta * chosen) + torch.sigmoid(-margins)
    difference = chosen / scores.chosen_tokens.clamp(min=1) - rejected / scores.rejected_tokens.clamp(min=1)
    match name:
        case "ipo":  # arXiv:2310.12036, equation 17
            return (difference - 1 / (2 * beta)).square()
        case "sigmoid_norm":
            return -logsigmoid(beta * difference)
    raise ValueError(f"preference.loss_type: {name}")


def _orpo(scores: AnswerScores, beta: float) -> PairLosses:
    chosen = scores.chosen / scores.chosen_tokens.clamp(min=1)
    rejected = scores.rejected / scores.rejected_tokens.clamp(min=1)
    losses = -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    chosen, rejected = chosen.detach(), rejected.detach()
    return PairLosses(losses, 1.0, beta * chosen, beta * rejected, chosen, rejected)


def _reward(scores: AnswerScores, centering: float) -> PairLosses:
    losses = -logsigmoid(scores.chosen - scores.rejected) + centering * (scores.chosen + scores.rejected).square()
    chosen, rejected = scores.chosen.detach(), scores.rejected.detach()
    return PairLosses(losses, 0.0, chosen, rejected, chosen, rejected)


def _log_odds(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p))."""
    return log_probabilities - torch.log(-torch.expm1(log_probabilities))


def step_loss(losses: PairLosses, scores: AnswerScores, divisors: torch.Tensor | None) -> torch.Tensor:
    """Return the share of these pairs in the loss of an optimizer step.

    `divisors`: the step's numbers of pairs and of trained tokens of chosen answers, int64 [2]; None = those given here.
    """
    counted = scores.chosen_tokens > 0
    if divisors is None:
        divisors = torch.stack([counted.sum(), scores.chosen_tokens.sum()])
    pairs, tokens = divisors.clamp(min=1)
    loss = losses.losses.where(counted, 0).sum() / pairs
    return loss - losses.nll_weight * scores.chosen.sum() / tokens if losses.nll_weight else loss
