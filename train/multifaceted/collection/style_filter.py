"""Instructions that already say how they want to be answered: another system message would contradict them.

Rules, not a model: each finds words of one kind, and tells which. What belongs to the task itself is no such thing (a
poem where a poem is asked for, the table that a question is about), nor is what a story in the instruction tells of its
people, so most rules want a verb of speaking or making in the imperative, or speak to "you". The rules know English
alone; in any other language they find next to nothing.
"""

import functools
import re
from dataclasses import dataclass
from typing import get_args

from train.multifaceted.collection.style_patterns import RULES, Kind


@dataclass(frozen=True, slots=True)
class StyleStatement:
    """Words of an instruction that say how it is to be answered."""

    kind: Kind
    words: str


_NOT_READ = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]{12,}\"|“[^”\n]{12,}”", re.DOTALL)
_FIRST, _LAST = 8_000, 4_000
"""Characters of a long instruction that are read: who says how to answer does so before or after the material."""
_LONGEST_SHOWN = 120


@functools.cache
def _compiled() -> tuple[tuple[Kind, re.Pattern[str]], ...]:
    return tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in RULES)


def find_style_statements(instruction: str, kinds: tuple[Kind, ...] = get_args(Kind)) -> list[StyleStatement]:
    """What an instruction says of how it is to be answered, by kind and the words that say so; nothing as a rule.

    Code and longer quotations in it aren't read, and of a very long one only the beginning and the end.
    """
    if len(instruction) > _FIRST + _LAST:
        instruction = f"{instruction[:_FIRST]}\n{instruction[-_LAST:]}"
    text = _NOT_READ.sub(" … ", instruction)
    found: list[StyleStatement] = []
    for kind, pattern in _compiled():
        if kind in kinds and (match := pattern.search(text)):
            words = " ".join(match[0].split()).strip(" .,:;!?*#-").lstrip("0123456789. ")
            if not any(words in other.words or other.words in words for other in found):
                found.append(
                    StyleStatement(kind, words if len(words) <= _LONGEST_SHOWN else f"{words[:_LONGEST_SHOWN]}...")
                )
    return found
