"""Balance of tags: which rows are reminded of a rare tag, so that a target share of the messages has it.

The share of rows to remind follows from earlier rows: if a share b of the messages has the tag without a reminder and a
share r with one, a target t takes reminders in (t - b) / (r - b) of the rows. A row's result counts from `LAG` rows
behind it on. By then it is final, however many rows are in progress and in whatever order they end, so the same
answers give the same reminders.
"""

import random
from collections import Counter, deque

from train.sysgen.config import SysgenConfig
from train.sysgen.result import RowResult

LAG = 4_096
"""Rows between a result and the first row that it influences; more than are ever in progress."""

_PRIOR_WITHOUT_REMINDER = {
    "Role": 0.97, "Content": 0.97, "Task": 0.98, "Action": 0.73, "Style": 0.68, "Background": 0.64, "Tool": 0.10,
    "Format": 0.59,
}  # fmt: skip
"""Prior share of messages with each tag: the mean of the paper's three generators (its table of tags)."""
_PRIOR_WITH_REMINDER = 0.5
_PRIOR_ROWS = 50
"""Weight of the priors, in rows."""


class TagBalance:
    """Counts of messages with each tag, from which the reminders of later rows are drawn."""

    def __init__(self, config: SysgenConfig) -> None:
        self.targets = {tag: share for tag, share in config.tags.target_share.model_dump().items() if share}
        self.seed = config.seed
        self._rows: Counter[tuple[str, bool]] = Counter()
        """Messages by tag and whether the row was reminded of it."""
        self._with_tag: Counter[tuple[str, bool]] = Counter()
        self._pending: deque[RowResult] = deque()

    def add(self, result: RowResult) -> None:
        """Add the result of the next row, in the order of the rows."""
        if self.targets:
            self._pending.append(result)

    def draw_reminders(self, index: int) -> tuple[str, ...]:
        """Return the tags that row `index` is reminded of. Call it in the order of the rows."""
        while self._pending and self._pending[0].index <= index - LAG:
            self._count(self._pending.popleft())
        rng = random.Random(f"{self.seed} reminders {index}")
        return tuple(
            tag for tag, target in self.targets.items() if rng.random() < self.compute_reminder_share(tag, target)
        )

    def compute_reminder_share(self, tag: str, target: float) -> float:
        """Return the share of rows to remind of `tag` at present, from 0 to 1."""
        without, reminded = self._share(tag, False), self._share(tag, True)
        if without >= target:
            return 0.0
        return 1.0 if reminded <= target else (target - without) / (reminded - without)

    def _count(self, result: RowResult) -> None:
        if result.reason is not None or not result.message.phrases:
            return
        for tag in self.targets:
            key = (tag, tag in result.reminded_of)
            self._rows[key] += 1
            self._with_tag[key] += tag in result.message.tags

    def _share(self, tag: str, was_reminded: bool) -> float:
        prior = _PRIOR_WITH_REMINDER if was_reminded else _PRIOR_WITHOUT_REMINDER[tag]
        key = (tag, was_reminded)
        return (self._with_tag[key] + prior * _PRIOR_ROWS) / (self._rows[key] + _PRIOR_ROWS)
