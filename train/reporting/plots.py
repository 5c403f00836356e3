"""Plots of reports as PNG files: metrics over optimizer steps, and horizontal bars with 95 % intervals.

Everything but `load_pyplot` takes or yields matplotlib objects; matplotlib is imported when the first plot is drawn.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE_COLOR = "lightgray"
COLOR = "tab:blue"
_MAX_MARKED_POINTS = 30
"""Lines through fewer points have a marker at each."""

Interval = tuple[float, float | None, float | None]
"""A value and the bounds of its interval; None without one."""


@dataclass(frozen=True)
class BarSeries:
    """One bar in each row of a bar plot. `label` is its legend entry; empty for a plot with a single series."""

    values: Sequence[Interval]
    label: str = ""
    color: str = COLOR


def load_pyplot() -> Any:
    """Return matplotlib.pyplot with the backend that draws into files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def escape_label(text: str) -> str:
    """Escape what matplotlib reads into a text: `$` starts a formula, and `_` first hides a label from the legend."""
    return text.replace("$", r"\$").replace("_", " _", text.startswith("_"))


@contextmanager
def new_figure(path: Path, width: float, height: float, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes; save it to `path` and close it when the block ends.

    Args:
        path: PNG file, 100 pixels per inch.
        width: inches.
        height: inches.
        subplots: arguments of pyplot.subplots, such as nrows and squeeze.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(width, height), dpi=100, layout="constrained", **subplots)
    try:
        yield figure, axes
        figure.savefig(path)
    finally:
        pyplot.close(figure)


@contextmanager
def step_plot(path: Path, title: str, ylabel: str) -> Iterator[Any]:
    """Yield axes over optimizer steps and save them as a PNG of 1,000 x 500 pixels, with a legend below the axes."""
    with new_figure(path, 10, 5) as (figure, axes):
        yield axes
        axes.set_title(escape_label(title))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        left, right = axes.dataLim.intervalx
        if left == right:
            axes.set_xlim(left - 1, right + 1)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)


def plot_metric(
    axes: Any,
    metrics: Iterable[Mapping[str, Any]],
    key: str,
    label: str,
    *,
    markers: bool = False,
    width: float | None = None,
) -> None:
    """Draw `key` of the lines of metrics.jsonl over `step`, with the band from `key_low` to `key_high` where logged.

    Lines without a number under `key` are left out. `markers`: mark each point even where there are many; a line
    through a single point would be invisible without. `width`: of the line, in points; None = matplotlib's.
    """
    lines = [line for line in metrics if isinstance(line.get(key), float)]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    marked = markers or len(lines) < _MAX_MARKED_POINTS
    axes.plot(steps, [line[key] for line in lines], "o-" if marked else "-", label=label, linewidth=width)
    if all(f"{key}_low" in line for line in lines):
        low, high = ([line[f"{key}_{bound}"] for line in lines] for bound in ("low", "high"))
        axes.fill_between(steps, low, high, alpha=0.2)


@contextmanager
def bar_plot(path: Path, title: str, xlabel: str, names: Sequence[str], series: Sequence[BarSeries]) -> Iterator[Any]:
    """Draw a row of horizontal bars per name, yield the axes (for limits and lines) and save them as a PNG.

    Args:
        path: PNG file, 900 pixels wide.
        title: title of the figure.
        xlabel: label of the value axis.
        names: names of the rows, from top to bottom.
        series: one bar per row each; a legend names them where they have labels.
    """
    with new_figure(path, 9, 0.4 * len(names) + 1.6) as (figure, axes):
        draw_bars(axes, names, series)
        axes.set_xlabel(escape_label(xlabel))
        figure.suptitle(escape_label(title), fontsize=11)
        yield axes
        if any(bars.label for bars in series):
            figure.legend(loc="outside lower center", ncols=2, frameon=False)


def draw_bars(axes: Any, names: Sequence[str], series: Sequence[BarSeries]) -> None:
    """Draw a row of horizontal bars per name, from top to bottom, with the intervals as error bars."""
    height = 0.8 / len(series)
    for number, bars in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * height
        axes.barh(
            [row + offset for row in range(len(names))],
            [value for value, _, _ in bars.values],
            height,
            xerr=error_bars(bars.values),
            label=escape_label(bars.label),
            color=bars.color,
            capsize=2,
        )
    axes.set_yticks(range(len(names)), [escape_label(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.01)


def error_bars(intervals: Iterable[Interval]) -> list[list[float]]:
    """Return the lengths of the error bars below and above each value; NaN, which is not drawn, without an interval.

    A percentile interval need not contain the value itself: lengths are at least 0.
    """
    complete = [
        (value, low, high) if low is not None and high is not None else (math.nan,) * 3
        for value, low, high in intervals
    ]
    return [[max(value - low, 0) for value, low, _ in complete], [max(high - value, 0) for value, _, high in complete]]
