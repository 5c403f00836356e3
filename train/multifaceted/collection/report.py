"""Report of a collection: counts, coverage of the hierarchy, similarity of messages, lengths, usage and samples."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.datagen import report
from train.multifaceted.collection.hierarchy import DIMENSIONS
from train.pressure.generated_counts import pressure_section
from train.reporting.markdown import code_block, count_section, format_share, format_table
from train.reporting.plots import BASELINE_COLOR, BarSeries, draw_bars, new_figure

_MOST_PLOTTED = 40
"""Sub-dimensions of a dimension in the plot; more would be unreadable."""


def write_report(folder: Path, facts: Mapping[str, Any], seconds: float | None) -> Path:
    """Write report.json, report.md and its plot into `folder`; return the path of report.md.

    `facts`: of `CollectionStats`. `seconds`: from the first request to the last answer.
    """
    plot_coverage(facts, folder / "coverage.png")
    return report.write_report(folder, facts, _sections(folder.name, facts, seconds))


def _sections(name: str, facts: Mapping[str, Any], seconds: float | None) -> Iterable[str]:
    rows, sets = facts["rows"], facts["sets"]
    yield f"# {name}"
    yield (
        f"{facts['rows_written']:,} rows (system message, instruction, answer) and {facts['pairs']:,} preference "
        f"pairs, by {facts['model']}. Prompt version: {facts['prompt_version']}."
    )
    yield from report.warning_section(facts)
    yield (
        "All figures were counted in this run. Figures of the paper's own collection are quoted only where its text is "
        "available; its numbers of seed preferences and its similarity of messages could not be confirmed, so they are "
        "not quoted, and nothing here is compared with them."
    )
    yield "## Instructions"
    counts = (
        ("source rows", rows, None),
        ("instructions", facts["instructions"], rows),
        ("preference sets started", sets, None),
        ("preference sets written", facts["sets_written"], sets),
        ("instructions with a written set", facts["instructions_written"], facts["instructions"]),
    )
    yield format_table(
        ("", "count", "share"),
        [(name, f"{count:,}", "" if of is None else format_share(count, of)) for name, count, of in counts],
    )
    yield from count_section("Dropped instructions", "reason", facts["left_out"], rows, "share of rows")
    yield from count_section("Dropped sets", "reason", facts["sets_left_out"], sets, "share of sets")
    yield from report.failure_section(facts)
    yield from count_section(
        "Events", "event", facts["events"], remark="Over all tries, including those of dropped sets."
    )
    yield from pressure_section(facts.get("pressure"))
    yield "## Coverage"
    yield (
        "`planned`: number of sets that the plan gives a sub-dimension; counts of one dimension differ by at most one, "
        "unless the model dropped instructions (`filter.model`). `written`: number of those sets that were written. "
        "Evenness: entropy over its maximum; 1 = all equally often. Preferences that differ only in case and "
        "punctuation count as one."
    )
    yield format_table(
        ("dimension", "sub-dimensions", "entropy (bits)", "evenness", "distinct preferences", "their evenness"),
        [_dimension_row(dimension, facts["coverage"][dimension]) for dimension in DIMENSIONS],
    )
    yield "![number of written sets by sub-dimension](coverage.png)"
    yield format_table(
        ("sub-dimension", "planned", "written", "share of its dimension", "distinct preferences"),
        [
            (f"{dimension} / {name}", f"{of['drawn']:,}", f"{of['written']:,}", _format(of["share"], ".1%"),
             f"{of['distinct_preferences']:,}")
            for dimension in DIMENSIONS
            for name, of in facts["coverage"][dimension]["subdimensions"].items()
        ],
    )  # fmt: skip
    yield from _frequent_preferences(facts["coverage"])
    yield "## Similarity of the messages"
    yield _describe_similarity(facts["similarity"])
    yield "## Lengths"
    yield format_table(
        ("characters", "rows", "p5", "median", "p95", "mean"),
        [
            (name, f"{of['count']:,}", *(_format(of[key], ",.0f") for key in ("p5", "median", "p95", "mean")))
            for name, of in facts["characters"].items()
        ],
    )
    yield from report.usage_section(facts, seconds)
    yield "## Samples"
    yield "Instructions drawn with the seed, in the order of the sources, with all their sets."
    yield from map(_sample_section, facts["samples"])


def _dimension_row(dimension: str, coverage: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        dimension,
        f"{coverage['distinct_subdimensions']:,} of {len(coverage['subdimensions']):,}",
        f"{coverage['entropy_bits']:.3f}",
        _format(coverage["evenness"], ".3f"),
        f"{coverage['distinct_preferences']:,} of {coverage['sets']:,}",
        _format(coverage["preference_evenness"], ".3f"),
    )


def _frequent_preferences(coverage: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        (preference["preference"], dimension, f"{preference['times']:,}")
        for dimension in DIMENSIONS
        for preference in coverage[dimension]["most_frequent"][:3]
    ]
    if rows:
        yield "### The most frequent preferences"
        yield format_table(("preference", "dimension", "times"), rows)


def _describe_similarity(similarity: Mapping[str, Any]) -> str:
    if not similarity["siblings"]["count"]:
        return "No instruction has two messages to compare."
    rows = [
        (
            name,
            f"{similarity[key]['count']:,}",
            *(_format(similarity[key][figure], ".3f") for figure in ("mean", "p5", "median", "p95")),
        )
        for name, key in (("of one instruction (siblings)", "siblings"), ("of different ones (strangers)", "strangers"))
    ]
    return (
        f"ROUGE-L (F1) between system messages of {similarity['instructions']:,} instructions, drawn with the seed. "
        "Siblings should be no more similar than messages of different instructions.\n\n"
        + format_table(("messages", "pairs", "mean", "p5", "median", "p95"), rows)
    )


def _sample_section(sample: Mapping[str, Any]) -> str:
    parts = [f"### {sample['source']}", code_block(sample["prompt"])]
    for number, written in enumerate(sample["sets"], 1):
        parts.append(f"**{number}**: {'; '.join(written['preferences'])}".replace("\n", " "))
        parts.append(f"System message\n\n{code_block(written['system'])}")
        parts.append(f"Answer\n\n{code_block(written['output'])}")
    return "\n\n".join(parts)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def plot_coverage(facts: Mapping[str, Any], path: Path) -> None:
    """Plot how many sets of each sub-dimension were planned and written, one panel per dimension."""
    with new_figure(path, 10, 7, nrows=2, ncols=2) as (figure, grid):
        for axes, dimension in zip(grid.flat, DIMENSIONS, strict=True):
            coverage = facts["coverage"][dimension]["subdimensions"]
            names = list(coverage)[:_MOST_PLOTTED]
            planned, written = ([(coverage[name][key], None, None) for name in names] for key in ("drawn", "written"))
            draw_bars(axes, names, [BarSeries(planned, "planned", BASELINE_COLOR), BarSeries(written, "written")])
            axes.set_title(dimension, fontsize=10)
            axes.tick_params(labelsize=8)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="x", alpha=0.3)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("Number of preference sets by sub-dimension, planned and written", fontsize=11)
