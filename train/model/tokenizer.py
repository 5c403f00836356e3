"""Tokenizers: the model's own, and as a recipe uses it, with its chat template and policy for system messages."""

import json
from datetime import date
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from train.data.chat.system_role import Probe, apply_system_role
from train.data.chat.template import pin_date, use_template
from train.errors import UserError
from train.model.folder import check_model_exists, read_json
from train.model.pretrained import optional_file, origin, reading
from train.recipe import ChatSection, ModelSection


class ChatTokenizer(NamedTuple):
    """A tokenizer with the chat template of a recipe, generation marks included."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Description of the template in use."""
    probe: Probe
    """Treatment of system messages by the template before `chat.system_role` was applied to it."""


def load_chat_tokenizer(model: ModelSection, chat: ChatSection, day: date | None = None) -> ChatTokenizer:
    """Return the tokenizer of a model with the template, system role and default system message of `chat`.

    `day`: the date that templates with a date write, if not today's.
    Raises UserError if there is no such tokenizer or template, or if the template would lose system messages.
    """
    return apply_chat_section(load_tokenizer(model), chat, day)


def apply_chat_section(tokenizer: PreTrainedTokenizerBase, chat: ChatSection, day: date | None = None) -> ChatTokenizer:
    """Give `tokenizer` the template, system role and default system message of `chat`. Raises UserError."""
    template = use_template(tokenizer, chat.template)
    probe = apply_system_role(tokenizer, chat.system_role, chat.default_system)
    if day is not None:
        pin_date(tokenizer, day)
    return ChatTokenizer(tokenizer, template, probe)


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Raises UserError if there is none that can be opened."""
    check_model_exists(model)
    with reading(model, "tokenizer.json, tokenizer_config.json, special_tokens_map.json or added_tokens.json"):
        tokenizer = AutoTokenizer.from_pretrained(**origin(model), config=_minimal_config(Path(model.name_or_path)))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(model)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ModelSection, embeddings: int) -> None:
    """Raise UserError if the tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > embeddings:
        raise UserError(
            f"model.name_or_path: the tokenizer of {model.name_or_path} has {len(tokenizer):,} tokens, its model only "
            f"{embeddings:,} embeddings. Use the tokenizer that belongs to this model."
        )


def _minimal_config(folder: Path) -> PreTrainedConfig | None:
    """Return a config with all that AutoTokenizer reads of it, where it needs no more to choose its class; else None.

    With None it loads the model's own config, whose class imports torch.compile and DTensor (1.6 s; transformers 5.23,
    utils/type_validators.py).
    """
    config, settings = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not isinstance(settings.get("tokenizer_class"), str):
        return None
    if "auto_map" in config or "auto_map" in settings:  # code that comes with the model
        return None
    minimal = PreTrainedConfig(name_or_path=str(folder), tokenizer_class=config.get("tokenizer_class"))
    minimal.model_type = kind
    if "model_name" in config:
        minimal.model_name = config["model_name"]
    return minimal


def _processor_template(model: ModelSection) -> str | None:
    """Return the chat template of a multimodal model that keeps it with its processor alone (chat_template.json)."""
    file = optional_file(model, "chat_template.json")
    try:
        return str(json.loads(Path(file).read_bytes())["chat_template"]) if file else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
