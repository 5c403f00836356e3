"""Reasons for dropped rows, and the losses that a configuration accepts.

A row that a rule of the configuration drops (a gate, `on_empty`, a filter) is no loss. Losses have reasons that no
setting decides; `accept_losses` names the kinds that are acceptable. A run with other losses ends with exit code 2.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal

from train.llm.failures import NO_ANSWER

Loss = Literal["no_answer", "unreadable", "unsupported"]

UNREADABLE = "can't be read"
UNSUPPORTED = "not supported"

_EMPTY = "(?:new answer|verification|system message|(?:system message|preferences|descriptions|answer):) empty"
"""Reasons of rows whose last try had no text."""
_PREFIXES: dict[Loss, re.Pattern[str]] = {
    "no_answer": re.compile(rf"{NO_ANSWER}|{_EMPTY}\b"),
    "unreadable": re.compile(UNREADABLE),
    "unsupported": re.compile(UNSUPPORTED),
}
"""Beginnings of the reasons that belong to each loss."""

ReasonCounts = Mapping[str, int]
"""Number of dropped rows by reason."""


def find_unaccepted_losses(reasons: ReasonCounts, accepted: Collection[Loss]) -> dict[Loss, ReasonCounts]:
    """Return the reasons that are losses outside `accepted`, by loss."""
    losses: dict[Loss, ReasonCounts] = {}
    for loss, prefix in _PREFIXES.items():
        counts = {reason: count for reason, count in reasons.items() if prefix.match(reason)}
        if counts and loss not in accepted:
            losses[loss] = counts
    return losses


def format_loss_error(losses: Mapping[Loss, ReasonCounts], accepted: Collection[Loss], file: object) -> str:
    """Return the error message of a run with unaccepted losses. `file`: holds the dropped rows."""
    reasons = "; ".join(f"{count:,}: {reason}" for counts in losses.values() for reason, count in counts.items())
    names = [loss for loss in _PREFIXES if loss in losses or loss in accepted]
    remedies = []
    if "no_answer" in losses:
        remedies.append("The same command asks again for those without an answer, and for nothing else")
    if losses.keys() - {"no_answer"}:
        remedies.append("Correct the data of those that can't be read or are not supported")
    return (
        f"rows are missing for reasons that no setting accepts ({reasons}). All other rows are written; the dropped "
        f"ones are in {file}. {'. '.join(remedies)}. To accept such losses, write "
        f"`accept_losses: [{', '.join(names)}]`."
    )


def format_drop_reasons(rows: int, reasons: ReasonCounts) -> str:
    """Return why all rows of a run were dropped. `rows` is not 0: a source without rows is an error of its own."""
    return f"all {rows:,} were dropped ({'; '.join(f'{count:,}: {reason}' for reason, count in reasons.items())})"
