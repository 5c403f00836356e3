"""Filter for instructions that already say how to answer them, which another system message would contradict.

It uses rules, no model: each pattern finds statements of one kind. Most patterns require an imperative verb of speaking
or making, or words to "you", so that the task itself (a poem where a poem is asked for, the table that a question is
about) and the story in an instruction do not count. The patterns are English; in other languages they match almost
nothing.
"""

import functools
import re
from dataclasses import dataclass
from typing import get_args

from train.multifaceted.collection.style_patterns import PATTERNS, Kind


@dataclass(frozen=True, slots=True)
class StyleStatement:
    """Words of an instruction that say how to answer it."""

    kind: Kind
    words: str


_IGNORED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]{12,}\"|“[^”\n]{12,}”", re.DOTALL)
"""Code and longer quotations."""
_FIRST, _LAST = 8_000, 4_000
"""Characters read of a long instruction: statements of style stand before or after the material."""
_LONGEST_SHOWN = 120


@functools.cache
def _compiled_patterns() -> tuple[tuple[Kind, re.Pattern[str]], ...]:
    return tuple(
        (kind, re.compile(pattern, re.IGNORECASE)) for kind, patterns in PATTERNS.items() for pattern in patterns
    )


def find_style_statements(instruction: str, kinds: tuple[Kind, ...] = get_args(Kind)) -> list[StyleStatement]:
    """Return the statements of an instruction on how to answer it; usually none.

    Code, longer quotations and the middle of a very long instruction are ignored.
    """
    if len(instruction) > _FIRST + _LAST:
        instruction = f"{instruction[:_FIRST]}\n{instruction[-_LAST:]}"
    text = _IGNORED.sub(" … ", instruction)
    statements: list[StyleStatement] = []
    for kind, pattern in _compiled_patterns():
        if kind in kinds and (match := pattern.search(text)):
            words = " ".join(match[0].split()).strip(" .,:;!?*#-").lstrip("0123456789. ")
            if not any(words in other.words or other.words in words for other in statements):
                shown = words if len(words) <= _LONGEST_SHOWN else f"{words[:_LONGEST_SHOWN]}..."
                statements.append(StyleStatement(kind, shown))
    return statements
