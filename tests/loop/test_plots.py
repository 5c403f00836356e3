"""Plots of a run: loss.png and system_gain.png."""

from pathlib import Path

import pytest

from train.loop.report import plot_loss, plot_system_gain
from train.reporting.plots import escape_label, step_plot

CURVES = {
    "one step": {"training": ([1], [3.2])},
    "two steps": {"training": ([1, 2], [3.2, 2.2]), "validation": ([2], [2.5])},
    "six steps": {"training": (range(1, 7), [3.0, 2.9, 2.8, 2.7, 2.6, 2.5]), "validation": ([3, 6], [3.1, 2.7])},
    "a long run": {"training": (range(1, 2_000), [1.0] * 1_999)},
}


@pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES)
def test_a_plot_over_steps_has_a_title_integer_steps_and_a_legend_outside_the_axes(
    curves: dict[str, tuple[list[int], list[float]]], tmp_path: Path
) -> None:
    run = tmp_path / "costs_$5_$6"
    run.mkdir()
    with step_plot(run / "loss.png", "Loss of costs_$5_$6", "loss") as axes:
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name)
    assert axes.get_title().replace("\\", "") == "Loss of costs_$5_$6"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss")
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*curves]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("name", ["_hidden_", "__init__", "$1$_a", "a_b"])
def test_a_legend_has_every_name(name: str, tmp_path: Path) -> None:
    with step_plot(tmp_path / "loss.png", "Loss", "loss") as axes:
        axes.plot([1, 2], [3.0, 2.0], label=escape_label(name))
    (legend,) = axes.figure.legends
    assert [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()] == [name]


def test_runs_without_metrics_are_plotted_too(tmp_path: Path) -> None:
    for metrics in ([], [{"step": 1, "loss": "nan"}], [{"step": 1, "eval_system_gain": 0.5, "eval_loss": 1.0}]):
        for draw in (plot_loss, plot_system_gain):
            draw(metrics, tmp_path / "picture.png")
            assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
            (tmp_path / "picture.png").unlink()
