"""Requirements on an answer that a program can check."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constraint:
    """One requirement, in words and as a check."""

    kind: str
    tag: str
    text: str
    is_met: Callable[[str], bool]


def draw(answers: Sequence[str], chance: random.Random, at_most: int) -> list[Constraint]:
    """Constraints that suit answers like these."""
    return []
