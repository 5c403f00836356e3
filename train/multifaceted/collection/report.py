"""report.md, report.json and coverage.png of a collection: what became of its instructions, and what it covers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.llm.failures import to_table_cells
from train.multifaceted.collection.hierarchy import DIMENSIONS
from train.reporting.markdown import code_block, count_section, format_share, format_table, format_usage
from train.reporting.plots import load_pyplot


def write_report(folder: Path, facts: Mapping[str, Any], seconds: float | None) -> Path:
    """Write report.json, report.md and its picture into `folder`; the path of report.md.

    `facts`: those of `Tally`. `seconds`: from the first request to the last answer.
    """
    draw_coverage(facts, folder / "coverage.png")
    (folder / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    path = folder / "report.md"
    path.write_text("\n\n".join(_sections(folder.name, facts, seconds)) + "\n", encoding="utf-8")
    return path


def _sections(name: str, facts: Mapping[str, Any], seconds: float | None) -> Iterable[str]:
    rows, sets = facts["rows"], facts["sets"]
    yield f"# {name}"
    yield (
        f"{facts['sets_written']:,} rows (system message, instruction, answer) and {facts['pairs']:,} preference "
        f"pairs, by {facts['model']}. Prompt version: {facts['prompt_version']}."
    )
    yield from (f"**Warning: {warning}**" for warning in facts["warnings"])
    yield (
        "Every figure here was counted in this run. Figures of the paper's own collection stand here only where its "
        "text is at hand; its numbers of seed preferences and its similarity of messages we could not confirm, so they "
        "are not quoted, and nothing here is measured against them."
    )
    yield "## Instructions"
    yield format_table(
        ("", "count", "share"),
        [
            ("rows of the sources", f"{rows:,}", ""),
            ("instructions taken", f"{facts['instructions']:,}", format_share(facts["instructions"], rows)),
            ("preference sets begun", f"{sets:,}", ""),
            ("sets written", f"{facts['sets_written']:,}", format_share(facts["sets_written"], sets)),
            (
                "instructions with a set written",
                f"{facts['instructions_written']:,}",
                format_share(facts["instructions_written"], facts["instructions"]),
            ),
        ],
    )
    yield from count_section("Instructions left out", "reason", facts["left_out"], rows, "of rows")
    yield from count_section("Sets left out", "reason", facts["sets_left_out"], sets, "of sets")
    yield from count_section("Why no answer came", "what was said", to_table_cells(facts["unanswered"]))
    yield from count_section(
        "On the way", "what happened", facts["events"], remark="Over all tries, of what was lost too."
    )
    yield "## Coverage"
    yield (
        "`drawn`: how often a sub-dimension was to be taken, which differs by one at most unless the model left "
        "instructions out (`filter.model`); `written`: what is left of it. Evenness is the entropy over the largest "
        "possible one: 1 where all come equally often. Preferences that differ in case and marks alone are one."
    )
    yield format_table(
        ("dimension", "sub-dimensions", "entropy (bits)", "evenness", "distinct preferences", "their evenness"),
        [_dimension_row(dimension, facts["coverage"][dimension]) for dimension in DIMENSIONS],
    )
    yield "![how often each sub-dimension was written](coverage.png)"
    yield format_table(
        ("sub-dimension", "drawn", "written", "share of its dimension", "distinct preferences"),
        [
            (f"{dimension} / {name}", f"{of['drawn']:,}", f"{of['written']:,}", _percent(of["share"]),
             f"{of['distinct_preferences']:,}")
            for dimension in DIMENSIONS
            for name, of in facts["coverage"][dimension]["subdimensions"].items()
        ],
    )  # fmt: skip
    yield from _most_frequent(facts["coverage"])
    yield "## How alike the messages are"
    yield _similarity(facts["similarity"])
    yield "## Lengths"
    yield format_table(
        ("characters", "rows", "5 %", "median", "95 %", "mean"),
        [
            (name, f"{of['count']:,}", *(_number(of[key]) for key in ("p5", "median", "p95", "mean")))
            for name, of in facts["characters"].items()
        ],
    )
    yield "## Cost"
    yield format_usage(facts["spent"], seconds)
    yield "## Samples"
    yield "Instructions chosen by the seed, in the order of the sources, with all their sets."
    for sample in facts["samples"]:
        yield _sample(sample)


def _dimension_row(dimension: str, of: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        dimension,
        f"{of['distinct_subdimensions']:,} of {len(of['subdimensions']):,}",
        f"{of['entropy_bits']:.3f}",
        _decimals(of["evenness"]),
        f"{of['distinct_preferences']:,} of {of['sets']:,}",
        _decimals(of["preference_evenness"]),
    )


def _most_frequent(coverage: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        (one["preference"], dimension, f"{one['times']:,}")
        for dimension in DIMENSIONS
        for one in coverage[dimension]["most_frequent"][:3]
    ]
    if rows:
        yield "### The most frequent preferences"
        yield format_table(("preference", "dimension", "times"), rows)


def _similarity(of: Mapping[str, Any]) -> str:
    if not of["siblings"]["count"]:
        return "No instruction has two messages to compare."
    rows = [
        (
            name,
            f"{of[key]['count']:,}",
            *(_decimals(of[key][figure]) for figure in ("mean", "p5", "median", "p95")),
        )
        for name, key in (("of one instruction (siblings)", "siblings"), ("of different ones", "strangers"))
    ]
    return (
        f"ROUGE-L (F1) between system messages of {of['instructions']:,} instructions, drawn by the seed: the siblings "
        "are to be as unlike each other as messages of different instructions are.\n\n"
        + format_table(("messages", "pairs", "mean", "5 %", "median", "95 %"), rows)
    )


def _sample(sample: Mapping[str, Any]) -> str:
    parts = [f"### {sample['source']}", code_block(sample["prompt"])]
    for number, one in enumerate(sample["sets"], 1):
        parts.append(f"**{number}**: {'; '.join(one['preferences'])}".replace("\n", " "))
        parts.append(f"System message\n\n{code_block(one['system'])}")
        parts.append(f"Answer\n\n{code_block(one['output'])}")
    return "\n\n".join(parts)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def draw_coverage(facts: Mapping[str, Any], path: Path) -> None:
    """How often each sub-dimension was written, by dimension, as a PNG of 1,000 x 700 pixels."""
    plots = load_pyplot()
    figure, grid = plots.subplots(2, 2, figsize=(10, 7), dpi=100)
    for axes, dimension in zip(grid.flat, DIMENSIONS, strict=True):
        of = facts["coverage"][dimension]["subdimensions"]
        names = list(of)[:40][::-1]  # more than that no one can read
        drawn = axes.barh(names, [of[name]["drawn"] for name in names], color="#dddddd", label="drawn")
        written = axes.barh(names, [of[name]["written"] for name in names], color="#4477aa", label="written")
        axes.set_title(dimension, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(handles=[drawn, written], loc="lower center", ncol=2, frameon=False)
    figure.suptitle("Sub-dimensions that were drawn and written", fontsize=11)
    figure.supxlabel("preference sets", fontsize=9, y=0.05)
    figure.subplots_adjust(left=0.12, right=0.98, top=0.91, bottom=0.12, wspace=0.3, hspace=0.25)
    figure.savefig(path)
    plots.close(figure)
