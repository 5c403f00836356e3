"""Figures of SysBench, as its authors define them: CSR, ISR and SSR.

- CSR, constraint satisfaction rate: share of criteria that are met.
- ISR, instruction satisfaction rate: share of turns whose criteria are all met: the turn holds.
- SSR, session stability rate: mean share of a conversation's turns that hold from the first on without a break.

A turn without an answer or without a verdict is in no mean:

- CSR and ISR leave out that turn and keep the others of its conversation.
- SSR and the shares of conversations that hold turns 1 to k leave out the conversation. To keep those that break before
  the missing turn would count short runs and not long ones.

So SSR is always the mean over k of the shares that hold turns 1 to k. Intervals are 95 %, over conversations
(train/resampling.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from train.evaluation.turns.figures import half_of
from train.evaluation.turns.sysbench_rows import TURNS, Conversation
from train.resampling import SHARE_BOUNDS, Estimate, estimate_means

MEASURES = {
    "csr": "criteria met (CSR)",
    "isr": "turns that hold (ISR)",
    "ssr": "turns held from the first without a break (SSR)",
}
ALIGNMENTS = {"align": "aligned", "misalign": "misaligned"}
ROUNDS = {True: "dependent", False: "parallel"}

Value = tuple[float | None, int]
"""A value, None where it is missing, and the number of its conversation."""


@dataclass(frozen=True)
class JudgedConversation:
    """A conversation with the verdicts of each turn on its criteria; None for a turn without them."""

    conversation: Conversation
    verdicts: tuple[tuple[bool, ...] | None, ...]

    @property
    def holds(self) -> tuple[bool | None, ...]:
        """Return for each turn whether all criteria are met; None without verdicts."""
        return tuple(None if of_turn is None else all(of_turn) for of_turn in self.verdicts)

    @property
    def run_length(self) -> int | None:
        """Return the number of turns from the first that hold without a break; None if a turn has no verdicts."""
        if None in self.holds:
            return None
        return (*self.holds, False).index(False)


def figures(judged: Sequence[JudgedConversation], seed: int = 0) -> dict[str, Any]:
    """Return all figures for JSON: each an estimate with `of`, the number of its values, or None without any value."""
    numbered = list(enumerate(judged))
    criteria = _criteria(numbered)
    return {
        **_of_conversations(numbered, seed),
        "by_alignment": {
            name: {"isr": _share(_turns(numbered, alignment), seed)} for alignment, name in ALIGNMENTS.items()
        },
        "by_rounds": {
            name: _of_conversations([(n, each) for n, each in numbered if each.conversation.dependent is kind], seed)
            for kind, name in ROUNDS.items()
        },
        "by_type": {
            type: {"csr": _share([(met, number) for number, of_type, met in criteria if of_type == type], seed)}
            for type in sorted({type for _, type, _ in criteria})
        },
    }


def _of_conversations(judged: Sequence[tuple[int, JudgedConversation]], seed: int) -> dict[str, Any]:
    """Return CSR, ISR and SSR of numbered conversations, the curves over the turns, and their half-life."""
    runs = [(each.run_length, number) for number, each in judged if each.run_length is not None]
    through = [_estimate([(run > turn, number) for run, number in runs], seed) for turn in range(TURNS)]
    return {
        "conversations": len(judged),
        "csr": _share([(met, number) for number, _, met in _criteria(judged)], seed),
        "isr": _share(_turns(judged), seed),
        "ssr": _share([(run / TURNS, number) for run, number in runs], seed),
        "isr_by_turn": [_share([(each.holds[turn], n) for n, each in judged], seed) for turn in range(TURNS)],
        "holds_through": [_record(point) for point in through],
        "half": asdict(half_of([estimate for estimate, _ in filter(None, through)])) if runs else None,
    }


def _turns(judged: Iterable[tuple[int, JudgedConversation]], alignment: str | None = None) -> list[Value]:
    """Return whether each turn holds, of all turns or of those with this alignment."""
    return [
        (holds, number)
        for number, each in judged
        for turn, holds in zip(each.conversation.turns, each.holds, strict=True)
        if alignment in (None, turn.alignment)
    ]


def _criteria(judged: Iterable[tuple[int, JudgedConversation]]) -> list[tuple[int, str, bool]]:
    """Return number of the conversation, type and verdict of each criterion that has a verdict."""
    return [
        (number, criterion.type, met)
        for number, each in judged
        for turn, verdicts in zip(each.conversation.turns, each.verdicts, strict=True)
        for criterion, met in zip(turn.criteria, verdicts or (), strict=verdicts is not None)
    ]


def _share(values: Iterable[Value], seed: int) -> dict[str, Any] | None:
    """Return the mean of the values that are not None, for JSON; None without values."""
    return _record(_estimate(values, seed))


def _estimate(values: Iterable[Value], seed: int) -> tuple[Estimate, int] | None:
    """Return the mean of the values that are not None, with its interval over conversations, and their number."""
    rows = [(float(value), number) for value, number in values if value is not None]
    if not rows:
        return None
    column, numbers = np.array([[value] for value, _ in rows]), np.array([number for _, number in rows], np.int64)
    (estimate,) = estimate_means(column, numbers, np.zeros(1), [SHARE_BOUNDS], seed=seed, permutations=0)
    return estimate, len(rows)


def _record(share: tuple[Estimate, int] | None) -> dict[str, Any] | None:
    if share is None:
        return None
    record = share[0].record()
    del record["p"]  # a share is not tested against zero
    return record | {"of": share[1]}
