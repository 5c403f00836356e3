"""Reward models: transformers' sequence classifier with one label on the decoder of a language model.

The head `score` maps the hidden state of a text's last token to its reward, a number without bounds. A language model
has no such head: it is new, and its output layer is left out.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from train.errors import UserError

_CLASS = "ForSequenceClassification"
"""End of the names of such classes, also of peft's and of those that FSDP2 makes."""
SCORE_WEIGHT = "score.weight"
"""Name of the head's weight, in memory and in files."""


def is_classifier(config: PreTrainedConfig) -> bool:
    """Return whether the model of `config` was saved as a sequence classifier."""
    return any(name.endswith(_CLASS) for name in config.architectures or ())


def as_classifier(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Return the config of a reward model on the model of `config`, or of the one that it is already.

    `name`: of the model, for the UserError if transformers has no sequence classifier of its kind, or if it has other
    labels.
    """
    if is_classifier(config):
        if config.num_labels != 1:
            raise UserError(
                f"model.name_or_path: {name} is a classifier with {config.num_labels} labels, and a reward model has "
                "one. Name a language model, or a reward model."
            )
        return config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model.name_or_path: transformers has no sequence classifier for {config.model_type} ({name}), so there "
            "is no reward model of this kind. Name another model."
        )
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__name__]
    return config


def find_score_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the score head of a reward model, also under an adapter; None for a language model."""
    classifiers = (module for module in model.modules() if type(module).__name__.endswith(_CLASS))
    return next((getattr(module, "score", None) for module in classifiers), None)


def score_tokens(model: Any, head: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the reward that each token would have as the last one of its text, float32 [rows, tokens].

    transformers' forward pass returns one token's of each row, and a packed row has many texts. So the rewards are
    taken from the head as it computes them, within the forward pass of `model` and its wrappers.

    Args:
        model: a reward model as it is called.
        head: its score head.
        inputs: arguments of the model; labels are left out.
    """
    scores: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, __, output: scores.append(output))
    try:
        model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    finally:
        hook.remove()
    return scores[0].squeeze(-1).float()
