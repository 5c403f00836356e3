"""TODO: train.model.tokenizer."""

import json
from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from train.model.folder import refuse_missing_model
from train.model.load import _optional_file, _origin, _reading
from train.recipe import ModelSection


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError where there is none that can be opened."""
    refuse_missing_model(model)
    with _reading(model, "tokenizer.json, tokenizer_config.json, special_tokens_map.json or added_tokens.json"):
        tokenizer = AutoTokenizer.from_pretrained(**_origin(model))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(model)
    return tokenizer


def _processor_template(model: ModelSection) -> str | None:
    """The chat template of a multimodal model that keeps it with its processor alone (chat_template.json)."""
    file = _optional_file(model, "chat_template.json")
    try:
        return str(json.loads(Path(file).read_bytes())["chat_template"]) if file else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
