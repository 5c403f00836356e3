"""Loss weights of messages and rows: factors of the losses of their trained tokens, and the switches that are 0 or 1.

| key of a message                                                                       | values                |
|----------------------------------------------------------------------------------------|-----------------------|
| `weight` (OpenAI, Mistral), `loss_weight` (LLaMA-Factory), `loss_scale` (ms-swift)     | numbers >= 0          |
| `train`, `training` (axolotl), `loss`, `trainable`; reversed: `masked` (torchtune)     | true or 1, false or 0 |

A row has one in the column `loss_weight`. It multiplies those of the row's messages. 0 = not trained.
"""

from typing import Any

from train.data.sources.row_errors import RowError, is_blank, preview

LOSS_WEIGHT = "loss_weight"
"""Column of a row; and key of a message as templates take it, where the weight is not 1."""
SMALLEST, LARGEST = 0.000_001, 1_000_000
"""Limits of a weight that isn't 0: the product of a message's, its row's and its source's fits into float32."""

_WEIGHTS = ("weight", "loss_weight", "loss_scale")
_SWITCHES = ("train", "training", "loss", "trainable", "masked")
_PART_SWITCHES = ("train_detail", "training_detail")
WEIGHT_KEYS = (*_WEIGHTS, *_SWITCHES, *_PART_SWITCHES)
"""Keys of a message that decide on its loss."""


def read_weight(turn: dict[str, Any], number: int, role: str) -> float | None:
    """Return the loss weight of a turn by its weights and switches, None if it has none of them. Raises RowError."""
    for key in _PART_SWITCHES:
        if not is_blank(turn.get(key)):
            raise RowError(
                "unsupported loss switch",
                f"`{key}` of message {number} is for parts of it; a message is trained completely or not at all",
            )
    weight: float | None = None
    first = ""
    for key in (*_WEIGHTS, *_SWITCHES):
        if turn.get(key) is None:
            continue
        is_switch = key in _SWITCHES
        value = _check_weight(turn[key], f"`{key}` of message {number}", is_switch=is_switch)
        value = 1 - value if key == "masked" else value
        if weight is not None and value != (bool(weight) if is_switch else weight):
            raise RowError("conflicting values", f"message {number}: `{first}` and `{key}` contradict each other")
        if weight is None:
            weight, first = value, key
    if weight and role != "assistant":
        raise RowError(
            "unsupported loss switch",
            f"`{first}` of message {number} ({role}) would train it; only the assistant's messages are trained",
        )
    return weight


def set_weight(message: dict[str, Any], weight: float) -> None:
    """Note the loss weight of a trained answer in its message, as `weight_of` reads it."""
    message.pop(LOSS_WEIGHT, None)
    if weight not in (0, 1):
        message[LOSS_WEIGHT] = weight


def weight_of(message: dict[str, Any]) -> float:
    """Return the loss weight of an answer: 1 by default, 0 if it is not trained."""
    return float(message.get(LOSS_WEIGHT, 1)) if message.get("train", True) else 0.0


def apply_row_weight(value: Any, answers: list[dict[str, Any]]) -> None:
    """Multiply the loss weights of a row's answers by its own, if `value` is one. Raises RowError."""
    if value is None:
        return
    where = f"the row's `{LOSS_WEIGHT}`"
    weight = _check_weight(value, where)
    if not weight:
        raise RowError("no assistant turn", f"{where} is 0, so nothing of it would be trained. Leave the row out")
    for answer in answers:
        set_weight(answer, weight_of(answer) * weight)


def _check_weight(value: Any, where: str, *, is_switch: bool = False) -> float:
    """Return a loss weight, or 0 or 1 for a switch. Raises RowError."""
    is_number = isinstance(value, bool | int | float)
    if not is_number or not (value in (0, 1) or (not is_switch and SMALLEST <= value <= LARGEST)):
        expected = "true or false" if is_switch else f"0, or a number from {SMALLEST:f} to {LARGEST:,}"
        raise RowError("wrong type", f"{where} is {preview(value)}; it must be {expected}")
    return float(value)
