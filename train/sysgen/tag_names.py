"""The eight tags of SYSGEN (arXiv:2502.11330), and text that was not kept."""

from dataclasses import dataclass

TAGS = ("Role", "Content", "Task", "Action", "Style", "Background", "Tool", "Format")
"""The eight, in canonical order."""

NAMES = {name.casefold() + plural: name for name in TAGS for plural in ("", "s")}
"""Canonical names by what models write in their place, in lower case."""


@dataclass(frozen=True, slots=True)
class DroppedText:
    """Text that was not kept. `tag`: as the model wrote it, empty for text outside any tag."""

    tag: str
    text: str
    reason: str
