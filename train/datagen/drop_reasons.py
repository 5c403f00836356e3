"""Rows that a run loses for reasons that no setting decides, and the names by which a configuration accepts them.

What a rule of the configuration leaves out (a gate, `on_empty`, a filter) is accepted by that configuration, and is no
loss. `accept_losses` names the others; a run that has some which it doesn't name ends with exit code 2.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal

from train.formatting import format_count
from train.llm.failures import NO_ANSWER

Loss = Literal["no_answer", "unreadable", "unsupported"]

UNREADABLE = "can't be read"
UNSUPPORTED = "not supported"

_EMPTY = "(?:new answer|verification|system message|(?:system message|preferences|descriptions|answer):) empty"
"""An answer without any text, try after try."""
_REASONS: dict[Loss, re.Pattern[str]] = {
    "no_answer": re.compile(rf"{NO_ANSWER}|{_EMPTY}\b"),
    "unreadable": re.compile(UNREADABLE),
    "unsupported": re.compile(UNSUPPORTED),
}
"""The beginning of each loss's reasons in reports."""


def unaccepted(reasons: Mapping[str, int], accepted: Collection[Loss]) -> dict[Loss, dict[str, int]]:
    """Return the counts of the reasons that are losses which `accepted` doesn't name, by loss."""
    found: dict[Loss, dict[str, int]] = {}
    for loss, beginning in _REASONS.items():
        counts = {reason: count for reason, count in reasons.items() if beginning.match(reason)}
        if counts and loss not in accepted:
            found[loss] = counts
    return found


def about_losses(found: Mapping[Loss, Mapping[str, int]], accepted: Collection[Loss], left_out: object) -> str:
    """Return the error of a run with losses that are not accepted. `left_out`: the file that holds them."""
    reasons = "; ".join(f"{count:,}: {reason}" for counts in found.values() for reason, count in counts.items())
    names = [loss for loss in _REASONS if loss in found or loss in accepted]
    remedies = []
    if "no_answer" in found:
        remedies.append("The same command asks again for those without an answer, and for nothing else")
    if found.keys() - {"no_answer"}:
        remedies.append("Correct the data of those that can't be read or are not supported")
    return (
        f"rows are missing for reasons that no setting accepts ({reasons}). All others are written; each of these is "
        f"in {left_out}. {'. '.join(remedies)}. To accept such losses, write `accept_losses: [{', '.join(names)}]`."
    )


def unread_warning(what: str, unread: int, asked: int, consequence: str) -> list[str]:
    """Return one line where more than half of the verdicts were unread, else none.

    Args:
        what: the stage or setting that asked, which the line starts with.
        unread, asked: numbers of verdicts.
        consequence: what was done with the rows, and what to do now.
    """
    if 2 * unread <= asked:
        return []
    return [
        f"{what}: {unread:,} of {format_count(asked, 'verdict')} could not be read ({unread / asked:.0%}). {consequence}"
    ]
