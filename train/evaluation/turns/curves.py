"""Plot of shares over the user turns of a conversation, with a panel for each model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.reporting.plots import Interval, error_bars, escape_label, new_figure

_MOST_TICKS = 20
"""Numbers of turns below a panel; more would overlap."""


@contextmanager
def turn_panels(path: Path, titles: Sequence[str], turns: int, title: str) -> Iterator[list[Any]]:
    """Yield the axes of a panel for each of `titles`, for curves over `turns`, and save them as a PNG with a legend."""
    with new_figure(path, 5 * len(titles) + 2, 4.6, ncols=len(titles), squeeze=False, sharey=True) as (figure, axes):
        panels = list(axes[0])
        yield panels
        for panel, text in zip(panels, titles, strict=True):
            panel.set_title(escape_label(text), fontsize=10)
            panel.set_xlabel("user turn k")
            panel.set_xticks(range(1, turns + 1, math.ceil(turns / _MOST_TICKS)))
            panel.set_ylim(-0.02, 1.02)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("share of conversations that hold (95 %)")
        figure.suptitle(escape_label(title), fontsize=11)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def draw_curve(panel: Any, shares: Sequence[Interval | None], *, offset: float = 0.0, **style: Any) -> None:
    """Draw the share of each turn with its interval; None leaves a turn out.

    `offset`: shift along the turns, so that the points of several curves stand side by side. `style`: of `errorbar`.
    """
    points = [(turn + offset, share) for turn, share in enumerate(shares, 1) if share]
    intervals = [share for _, share in points]
    means = [mean for mean, _, _ in intervals]
    panel.errorbar([turn for turn, _ in points], means, yerr=error_bars(intervals), capsize=2, **style)
