"""report.md and report.json of a SYSGEN run: what its rows became, in the paper's tables and beyond."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.llm.failures import to_table_cells
from train.reporting.markdown import code_block, count_section, format_share, format_table, format_usage
from train.reporting.plots import load_pyplot
from train.sysgen.tags import TAGS

_PHASES = {
    "read": "read from the sources",
    "generated": "a system message was written",
    "filtered": "with a valid phrase (filter)",
    "verified": "with a phrase left after verification",
    "answered": "answered anew",
}


def write_report(folder: Path, facts: Mapping[str, Any], seconds: float | None) -> Path:
    """Write report.json, report.md and its two pictures into `folder`; the path of report.md.

    `facts`: those of `Tally`. `seconds`: from the first request to the last answer.
    """
    draw_tags(facts, folder / "tags.png")
    draw_lengths(facts, folder / "lengths.png")
    (folder / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    path = folder / "report.md"
    path.write_text("\n\n".join(_sections(folder.name, facts, seconds)) + "\n", encoding="utf-8")
    return path


def _sections(name: str, facts: Mapping[str, Any], seconds: float | None) -> Iterable[str]:
    rows = facts["rows"]
    yield f"# {name}"
    yield (
        f"{facts['rows_written']:,} of {rows:,} rows written ({format_share(facts['rows_written'], rows)}), "
        f"{facts['rows_with_system_message']:,} of them with a system message, by {facts['model']}. Prompt version: "
        f"{facts['prompt_version']}."
    )
    yield from (f"**Warning: {warning}**" for warning in facts["warnings"])
    yield "## Rows"
    yield format_table(
        ("phase", "rows", "of all"),
        [
            (_PHASES[phase], f"{count:,}", format_share(count, rows))
            for phase, count in facts["rows_through_phase"].items()
        ]
        + [("written", f"{facts['rows_written']:,}", format_share(facts["rows_written"], rows))],
    )
    yield from count_section("Left out", "reason", facts["left_out"], rows, "of all")
    yield from count_section("Why no answer came", "what was said", to_table_cells(facts["unanswered"]))
    yield from count_section(
        "On the way",
        "what happened",
        facts["events"],
        rows,
        "per row",
        "Over all tries and turns, of rows left out too.",
    )
    yield "## Tags"
    yield (
        "Verdicts are counted for all eight tags of every message that was judged, held by it or not: the last one "
        "tried for a row, and once for each turn of a conversation of several. So are repairs and what was dropped. "
        "Under `reminded, there` stand the written rows that were reminded of the tag, and how many of them hold it."
    )
    yield format_table(
        (
            "tag",
            "rows with it",
            "share",
            "Good",
            "Bad",
            "None",
            "no verdict read",
            "phrases removed",
            "reminded, there",
        ),
        [_tag_row(tag, facts["tags"][tag]) for tag in TAGS],
    )
    yield "![share of messages with each tag, and of verdicts](tags.png)"
    yield from count_section("Repaired in what the model wrote", "fault", facts["repairs"])
    yield from count_section("Dropped from what the model wrote", "reason", facts["dropped"])
    yield from count_section("Tags that are none of the eight", "tag", dict(list(facts["unknown_tags"].items())[:20]))
    yield from count_section("Constraints", "kind", facts["constraints"], facts["rows_written"], "of written")
    yield "## Answers"
    yield _answers(facts["characters"])
    if facts["characters"]["rows_answered_anew"]:
        yield "![length of new answers over the original ones](lengths.png)"
    yield "## Cost"
    yield format_usage(facts["spent"], seconds)
    yield "## Samples"
    yield "Chosen by the seed, in the order of the sources."
    for sample in facts["samples"]:
        yield _sample(sample)


def _tag_row(tag: str, of: Mapping[str, Any]) -> tuple[str, ...]:
    verdicts = of["verdicts"]
    removed = ", ".join(f"{count:,} {reason}" for reason, count in of["phrases_removed"].items())
    reminded = f"{of['reminded']:,}, {of['reminded_and_there']:,}" if of["reminded"] else ""
    share = "" if of["share"] is None else f"{of['share']:.1%}"
    counts = (f"{verdicts[name]:,}" for name in ("Good", "Bad", "None", "missing"))
    return (tag, f"{of['rows']:,}", share, *counts, removed, reminded)


def _answers(characters: Mapping[str, Any]) -> str:
    if not characters["rows_answered_anew"]:
        return "No row was written with new answers."
    return (
        f"{characters['rows_answered_anew']:,} rows were answered anew. The new answers have {characters['ratio']:.2f} "
        f"times the characters of the original ones in all ({characters['new_answers']:,} over "
        f"{characters['original_answers']:,}; the mean of the rows' ratios is {characters['mean_of_ratios']:.2f}). "
        f"A system message has {characters['system_message_mean']:,.0f} characters in the mean."
    )


def _sample(sample: Mapping[str, Any]) -> str:
    parts = [f"### {sample['source']}"]
    if sample["annotated"]:
        parts.append(code_block(sample["annotated"]))
    turns = [turn for turn in sample["conversation"] if turn["role"] != "system"]  # that one stands above, in its tags
    parts += [f"**{turn['role']}**\n\n{code_block(turn['content'])}" for turn in turns]
    return "\n\n".join(parts)


def draw_tags(facts: Mapping[str, Any], path: Path) -> None:
    """Share of messages with each tag, beside what was judged Bad and None, as a PNG of 1,000 x 500 pixels."""
    plots = load_pyplot()
    figure, axes = plots.subplots(figsize=(10, 5), dpi=100)
    rows = facts["rows_with_system_message"] or 1
    judged = max(1, *(sum(facts["tags"][tag]["verdicts"].values()) for tag in TAGS))
    bars = (
        ("messages with the tag", "#4477aa", [facts["tags"][tag]["rows"] / rows for tag in TAGS]),
        ("judged Bad", "#ee6677", [facts["tags"][tag]["verdicts"]["Bad"] / judged for tag in TAGS]),
        ("judged None", "#bbbbbb", [facts["tags"][tag]["verdicts"]["None"] / judged for tag in TAGS]),
    )
    for number, (name, colour, shares) in enumerate(bars):
        axes.bar([x + 0.27 * (number - 1) for x in range(len(TAGS))], shares, 0.25, label=name, color=colour)
    axes.set_xticks(range(len(TAGS)), TAGS)
    axes.set_title("Tags of the system messages")
    axes.set_xlabel("tag")
    axes.set_ylabel("share of messages, of verdicts")
    axes.set_ylim(0, 1)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plots.close(figure)


def draw_lengths(facts: Mapping[str, Any], path: Path) -> None:
    """How many times as long the new answers are, row by row, as a PNG of 1,000 x 400 pixels."""
    plots = load_pyplot()
    histogram = facts["characters"]["histogram_of_ratios"]
    edges = histogram["edges"]
    edges = [edges[0] ** 2 / edges[1], *edges, edges[-1] ** 2 / edges[-2]]
    figure, axes = plots.subplots(figsize=(10, 4), dpi=100)
    axes.stairs(histogram["rows"], edges, fill=True, color="#4477aa")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [2.0**power for power in range(-4, 5)], [*(f"1/{2**power}" for power in (4, 3, 2, 1)), *"1248", "16"]
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title("Lengths of the new answers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("characters of the new answer / of the original one")
    axes.set_ylabel("rows")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plots.close(figure)
