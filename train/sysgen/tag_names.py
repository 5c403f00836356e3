"""The eight tags of SYSGEN, the spellings of their names, and dropped text."""

from dataclasses import dataclass

TAGS = ("Role", "Content", "Task", "Action", "Style", "Background", "Tool", "Format")
"""The tags in canonical order."""

NAMES = {name.casefold() + plural: name for name in TAGS for plural in ("", "s")}
"""Canonical names by accepted spelling, in lower case."""


@dataclass(frozen=True, slots=True)
class DroppedText:
    """Text of a reply that was not kept. `tag`: as the model wrote it, empty for text outside any tag."""

    tag: str
    text: str
    reason: str
