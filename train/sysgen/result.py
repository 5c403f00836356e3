"""What became of one row: the conversation that is written, or why it is left out, and how it came to that."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from train.datagen.usage import Usage
from train.sysgen.tags import TaggedMessage, Verdict


@dataclass(slots=True)
class RowResult:
    """What became of one row. A row that is left out has a reason; how far it came stands in the rest."""

    index: int
    """The row's number in all sources, from 0."""
    place: str
    """Where the row stands: data.jsonl:12."""
    reason: str | None = None
    """Why it is left out, in the words of the report; None: it is written."""
    detail: str = ""
    """What the server, the reader or the gate said."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation as it is written, with its system message."""
    tools: list[dict[str, Any]] | None = None
    system: str = ""
    written_by_model: str = ""
    """The message in tags as the model wrote it, before anything was taken out."""
    message: TaggedMessage = field(default_factory=lambda: TaggedMessage(()))
    """What is left of it, with what was repaired and dropped."""
    verdicts: list[dict[str, Verdict]] = field(default_factory=list)
    """By tag; one item for the message, or for each turn of a conversation of several."""
    tags_judged: int = 0
    """Number of verdicts that were asked for: the message's tags, over all tries and turns."""
    constraints: list[dict[str, str]] = field(default_factory=list)
    answers: str = "original"
    """Whose answers are written: `anew` or `original`."""
    events: Counter[str] = field(default_factory=Counter)
    """What happened on the way, over all tries, in the words of the report."""
    phase: str = "read"
    """The last phase that it came through: read, generated, filtered, verified, answered."""
    reminded_of: tuple[str, ...] = ()
    spent: dict[str, Usage] = field(default_factory=dict)
    """By stage."""
    original_characters: int = 0
    new_characters: int = 0
    """Length of the answers before and after, where they were given anew."""

    def leave_out(self, reason: str, detail: str = "") -> "RowResult":
        """This row is not written."""
        self.reason, self.detail = reason, detail
        return self
