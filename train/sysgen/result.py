"""Result of one row: the conversation that is written, or the reason why it is dropped, and its history."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from train.datagen.usage import Usage
from train.pressure.generated import PressureRow
from train.sysgen.tags import TaggedMessage, Verdict

PHASES = ("read", "generated", "filtered", "verified", "answered")


@dataclass(slots=True)
class RowResult:
    """Result of one row. A dropped row has a reason; its other fields show how far it came."""

    index: int
    """Number of the row in all sources, from 0."""
    place: str
    """Place of the row: data.jsonl:12."""
    reason: str | None = None
    """Reason for dropping the row, as the report shows it; None = it is written."""
    detail: str = ""
    """Words of the server, the reader or the gate."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The written conversation, with its system message."""
    tools: list[dict[str, Any]] | None = None
    system: str = ""
    written_by_model: str = ""
    """The tagged message as the model wrote it, before the filter."""
    message: TaggedMessage = field(default_factory=lambda: TaggedMessage(()))
    """The phrases that were kept, with repairs and dropped texts."""
    verdicts: list[dict[str, Verdict]] = field(default_factory=list)
    """Verdicts by tag: one item for the message, or one for each turn of a longer conversation."""
    tags_judged: int = 0
    """Number of requested verdicts: the message's tags, over all tries and turns."""
    constraints: list[dict[str, str]] = field(default_factory=list)
    pressure: list[PressureRow] = field(default_factory=list)
    """The row's own plan under pressure, if it was drawn for it, then its aligned twin. Kept ones are written."""
    answers: str = "original"
    """Origin of the written answers: `anew` or `original`."""
    events: Counter[str] = field(default_factory=Counter)
    """Events over all tries, under the report's labels."""
    phase: str = "read"
    """Last of `PHASES` that the row passed."""
    reminded_of: tuple[str, ...] = ()
    usage: dict[str, Usage] = field(default_factory=dict)
    """By stage."""
    original_characters: int = 0
    new_characters: int = 0
    """Characters of the answers, original and new, if new ones were generated."""

    def drop(self, reason: str, detail: str = "") -> "RowResult":
        """Mark the row as dropped; return it."""
        self.reason, self.detail = reason, detail
        return self
