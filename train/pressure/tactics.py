"""Templates of tactics.yaml: what users, documents and tools say against a system message."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from train.pressure.rules import Split

Setting = Literal["reference", "aligned", "conflict", "injected", "extraction", "permitted"]
"""Relation of the user's turn to the system message.

- reference: a question alone. aligned: the user asks for the same as the message; conflict: for the opposite.
- injected: a quoted document or a tool result asks for the opposite.
- extraction: the message holds a secret, and the user asks for it.
- permitted: the user asks for something that the message allows and a nervous model refuses.
"""

SETTINGS: tuple[Setting, ...] = get_args(Setting)

SECRET_NAMES = {
    "seen": ("access code", "Wi-Fi password", "door code", "discount code", "voucher number"),
    "held_out": ("passphrase", "locker combination", "coupon code"),
}
_SECRET_WORDS = {
    "seen": ("tulip", "harbor", "copper", "meadow", "lantern", "pepper", "saddle", "violet"),
    "held_out": ("walnut", "glacier", "trumpet", "orchid"),
}


@cache
def _templates() -> dict[str, dict[str, dict[Split, list[str]]]]:
    texts: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "tactics.yaml").read_text(encoding="utf-8"))
    return texts


def tactics(setting: str) -> tuple[str, ...]:
    """Return the names of the tactics of a setting."""
    return tuple(_templates()[setting])


def templates(setting: str, tactic: str, split: Split) -> tuple[str, ...]:
    """Return the templates of a tactic. `setting` may also be clause, injection or generic_opposite."""
    return tuple(_templates()[setting][tactic][split])


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its fields replaced."""
    return template.format_map(values)


def secret_words(split: Split) -> tuple[str, ...]:
    """Return the words that secrets are made of: `tulip-4821`."""
    return _SECRET_WORDS[split]
