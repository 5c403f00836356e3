"""Gradient checkpointing of a recipe: two names of one setting, and TRL's selective kind."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from train.recipe.sft_config import with_defaults

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING_KEYS = ("gradient_checkpointing", "activation_checkpointing")
"""Two names of one setting in TRL; the second is used where it is written."""
KWARGS_KEYS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


def checkpointing_of(training: Mapping[str, Any]) -> Checkpointing:
    """Return the checkpointing of section `training`: none, selective (attention outputs are kept), or full."""
    settings = with_defaults(training)
    choices = [settings.get(key) for key in reversed(CHECKPOINTING_KEYS)]
    if not next((choice for choice in choices if choice is not None), False):
        return "none"
    selective = any(checkpointing_kwargs(settings, key).get("selective") for key in KWARGS_KEYS)
    return "selective" if selective else "full"


def checkpointing_kwargs(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a section of `training`, which may be JSON in a string; empty if it is missing or no JSON."""
    value = settings.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}
