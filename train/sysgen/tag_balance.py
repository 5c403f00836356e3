"""Which rows are reminded of a rare tag, so that a wished share of the messages holds it.

The share of rows to remind follows from what came of those before: with a share b of the messages that hold the tag
unasked and a share r of those that were reminded, a target t wants (t - b) / (r - b) of the rows reminded. A row
counts for those that come `LAG` rows behind it: they begin when it has long been settled, however many rows are at
work and in whatever order they end, so the same answers give the same reminders.
"""

import random
from collections import Counter, deque

from train.sysgen.config import SysgenConfig
from train.sysgen.result import RowResult

LAG = 4_096
"""Rows between one that is settled and the first that may know of it; more than are ever at work at once."""

_UNASKED = {
    "Role": 0.97, "Content": 0.97, "Task": 0.98, "Action": 0.73, "Style": 0.68, "Background": 0.64, "Tool": 0.10,
    "Format": 0.59,
}  # fmt: skip
"""Share of messages with each tag, the mean of the paper's three generators (its table of tags): what is believed
before there are rows to count."""
_REMINDED = 0.5
"""What is believed of those that were reminded."""
_WEIGHT_OF_BELIEF = 50
"""In rows."""


class TagBalance:
    """Counts what came of the rows, and says of which tags a row is reminded."""

    def __init__(self, config: SysgenConfig) -> None:
        self.targets = {tag: share for tag, share in config.tags.target_share.model_dump().items() if share}
        self.seed = config.seed
        self._rows: Counter[tuple[str, bool]] = Counter()
        self._with_tag: Counter[tuple[str, bool]] = Counter()
        self._unsettled: deque[RowResult] = deque()

    def settle(self, result: RowResult) -> None:
        """What became of the next row, in the order of the rows."""
        if self.targets:
            self._unsettled.append(result)

    def draw_reminders(self, index: int) -> tuple[str, ...]:
        """The tags that row `index` is reminded of. Rows ask in their order."""
        while self._unsettled and self._unsettled[0].index <= index - LAG:
            self._count(self._unsettled.popleft())
        rng = random.Random(f"{self.seed} reminders {index}")
        return tuple(
            tag for tag, target in self.targets.items() if rng.random() < self.compute_reminder_share(tag, target)
        )

    def compute_reminder_share(self, tag: str, target: float) -> float:
        """Share of rows to remind of `tag` now, between 0 and 1."""
        unasked, reminded = self._share(tag, False), self._share(tag, True)
        if unasked >= target:
            return 0.0
        return 1.0 if reminded <= target else (target - unasked) / (reminded - unasked)

    def _count(self, result: RowResult) -> None:
        if result.reason is not None or not result.message.phrases:
            return
        for tag in self.targets:
            case = (tag, tag in result.reminded_of)
            self._rows[case] += 1
            self._with_tag[case] += tag in result.message.tags

    def _share(self, tag: str, was_reminded: bool) -> float:
        believed = _REMINDED if was_reminded else _UNASKED[tag]
        case = (tag, was_reminded)
        return (self._with_tag[case] + believed * _WEIGHT_OF_BELIEF) / (self._rows[case] + _WEIGHT_OF_BELIEF)
