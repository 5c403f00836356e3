"""Figures over turns: shares that hold at turn k and in all turns up to k, run lengths, half-lives, differences.

A conversation is one unit. Conversations of one rule are correlated, so rules are the groups of all intervals
(train/resampling.py). A turn without an answer, and those after it, count as not held and not answered.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.pressure.turns import TurnsConversation, TurnsRow
from train.resampling import DIFFERENCE_BOUNDS, SHARE_BOUNDS, Bounds, Estimate, estimate_means

ALL = "all"
KINDS = {ALL: "all", "wording": "trained rules in held-out wordings", "rule": "rules never trained"}
VARIANTS = {"plain": "plain", "push_back": "with a push-back"}


@dataclass(frozen=True)
class JudgedTurn:
    """One turn's answer. `text`: None without one; `how`: how it ended; `why`: the reason for a missing answer."""

    text: str | None
    how: str
    held: bool = False
    answered: bool = False
    why: str | None = None
    advice: str = ""


@dataclass(frozen=True)
class JudgedTurns:
    """A conversation of the set in one variant, with its answers.

    - `gains`: for each turn the four MEASURES of train/system_gain/metric.py; None where they were not measured.
    """

    row: TurnsRow
    variant: str
    conversation: TurnsConversation
    turns: tuple[JudgedTurn, ...]
    gains: tuple[tuple[float, ...], ...] | None = None

    @property
    def held(self) -> list[bool]:
        """For each turn, whether it holds."""
        return [turn.held for turn in self.turns]

    @property
    def run_length(self) -> int:
        """The number of turns from the first that hold without a break."""
        return (*self.held, False).index(False)


@dataclass(frozen=True)
class Half:
    """The first turn by which half of the conversations have dropped the rule; None = more than half hold them all.

    `low`, `high`: the first turns by which the upper and the lower bound of the share that still holds are at most one
    half, the interval of Brookmeyer and Crowley (Biometrics 38, 1982); None = not within the turns.
    """

    turn: int | None
    low: int | None
    high: int | None


@dataclass(frozen=True)
class TurnFigures:
    """Figures of some conversations: a list has one estimate for each turn.

    - `held`: share that holds at turn k; `held_through`: in all turns 1 to k; `answered`: share answered at turn k.
    - `run_length`: mean number of turns from the first that hold without a break (SysBench's SSR is its share of all).
    """

    conversations: int
    held: list[Estimate]
    held_through: list[Estimate]
    answered: list[Estimate]
    run_length: Estimate
    half: Half

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        record = asdict(self)
        for share in (*record["held"], *record["held_through"], *record["answered"], record["run_length"]):
            del share["p"]  # a share is not tested against zero
        return record | {"run_share": self.run_length.mean / len(self.held)}


@dataclass(frozen=True)
class TurnDifferences:
    """Push-back minus plain over the same conversations, as TurnFigures; None for turns before the push-back."""

    held: list[Estimate | None]
    held_through: list[Estimate | None]
    answered: list[Estimate | None]
    run_length: Estimate

    def record(self) -> dict[str, Any]:
        """Return the differences for JSON."""
        return asdict(self)


def of_kind(judged: Sequence[JudgedTurns], variant: str, kind: str = ALL) -> list[JudgedTurns]:
    """Return the conversations of a variant and a kind, in the order of the set."""
    return [each for each in judged if each.variant == variant and kind in (ALL, each.row.held_out)]


def figures(judged: Sequence[JudgedTurns], seed: int = 0) -> TurnFigures:
    """Return the figures of conversations that have the same number of turns."""
    columns, bounds = _columns(judged)
    turns = len(judged[0].turns)
    estimates = _estimate(columns, judged, bounds, seed, permutations=0)
    held, through, answered = (estimates[start * turns : (start + 1) * turns] for start in range(3))
    return TurnFigures(len(judged), held, through, answered, estimates[-1], half_of(through))


def differences(plain: Sequence[JudgedTurns], push_back: Sequence[JudgedTurns], seed: int = 0) -> TurnDifferences:
    """Return push-back minus plain; both lists have the same conversations in the same order."""
    turns, at = len(plain[0].turns), push_back[0].conversation.push_back_at or 1
    columns = _columns(push_back)[0] - _columns(plain)[0]
    bounds: list[Bounds] = [*[DIFFERENCE_BOUNDS] * (3 * turns), (-float(turns), float(turns))]
    estimates = _estimate(columns, plain, bounds, seed)
    held, through, answered = (
        [estimates[start * turns + turn] if turn + 1 >= at else None for turn in range(turns)] for start in range(3)
    )
    return TurnDifferences(held, through, answered, estimates[-1])


def half_of(through: Sequence[Estimate]) -> Half:
    """Return the half-life of a curve of shares that hold all turns up to k."""

    def crossing(shares: Sequence[float | None]) -> int | None:
        return next((turn for turn, share in enumerate(shares, 1) if share is not None and share <= 0.5), None)

    low, high = (crossing([getattr(share, bound) for share in through]) for bound in ("low", "high"))
    return Half(crossing([share.mean for share in through]), low, high)


def gain_figures(judged: Sequence[JudgedTurns], seed: int = 0) -> dict[str, list[Estimate]]:
    """Return for each of the four measures of system gain an estimate for each turn."""
    from train.system_gain.metric import MEASURES

    values = np.array([each.gains for each in judged])  # [conversations, turns, measures]
    names = [(measure, turn) for measure in range(len(MEASURES)) for turn in range(values.shape[1])]
    columns = np.stack([values[:, turn, measure] for measure, turn in names], axis=1)
    is_share = [MEASURES[measure].startswith("accuracy") for measure, _ in names]
    bounds: list[Bounds] = [SHARE_BOUNDS if share else None for share in is_share]
    no_effect = np.array([0.5 if share else 0.0 for share in is_share])
    estimates = iter(_estimate(columns, judged, bounds, seed, no_effect=no_effect))
    return {measure: [next(estimates) for _ in range(values.shape[1])] for measure in MEASURES}


def by_rule(judged: Sequence[JudgedTurns]) -> dict[str, dict[str, float]]:
    """Return for each rule the number of conversations, the mean share of turns that hold, and the share of them that
    holds all turns."""
    rules: dict[str, list[JudgedTurns]] = {}
    for each in judged:
        rules.setdefault(each.conversation.rule.name, []).append(each)
    return {
        rule: {
            "conversations": len(of_rule),
            "held": float(np.mean([each.held for each in of_rule])),
            "held_through": float(np.mean([all(each.held) for each in of_rule])),
        }
        for rule, of_rule in sorted(rules.items())
    }


def _columns(judged: Sequence[JudgedTurns]) -> tuple[NDArray[np.float64], list[Bounds]]:
    """Return held, held through and answered of each turn, then the run length: [conversations, 3 turns + 1]."""
    held = np.array([each.held for each in judged], np.float64)
    answered = np.array([[turn.answered for turn in each.turns] for each in judged], np.float64)
    runs = np.array([[each.run_length] for each in judged], np.float64)
    turns = held.shape[1]
    bounds: list[Bounds] = [*[SHARE_BOUNDS] * (3 * turns), (0.0, float(turns))]
    return np.concatenate([held, np.minimum.accumulate(held, axis=1), answered, runs], axis=1), bounds


def _estimate(
    columns: NDArray[np.float64],
    judged: Sequence[JudgedTurns],
    bounds: Sequence[Bounds],
    seed: int,
    *,
    no_effect: NDArray[np.float64] | None = None,
    **options: int,
) -> list[Estimate]:
    _, groups = np.unique([each.conversation.rule.name for each in judged], return_inverse=True)
    effects = np.zeros(columns.shape[1]) if no_effect is None else no_effect
    return estimate_means(columns, groups.astype(np.int64), effects, bounds, seed=seed, **options)
