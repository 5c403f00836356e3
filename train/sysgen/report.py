"""Report of a SYSGEN run: rows through the phases, tags, answers, usage and samples; the paper's tables and more."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.datagen import report
from train.pressure.generated_counts import pressure_section
from train.reporting.markdown import code_block, count_section, format_share, format_table
from train.reporting.plots import BarSeries, bar_plot, new_figure
from train.sysgen.tags import TAGS

_PHASES = {
    "read": "read from the sources",
    "generated": "system message generated",
    "filtered": "with a valid phrase (filter)",
    "verified": "with a phrase left after verification",
    "answered": "with new answers",
}
_UNKNOWN_TAGS_SHOWN = 20


def write_report(folder: Path, facts: Mapping[str, Any], seconds: float | None) -> Path:
    """Write report.json, report.md and its two plots into `folder`; return the path of report.md.

    `facts`: of `SysgenStats`. `seconds`: from the first request to the last answer.
    """
    plot_tags(facts, folder / "tags.png")
    plot_length_ratios(facts, folder / "lengths.png")
    return report.write_report(folder, facts, _sections(folder.name, facts, seconds))


def _sections(name: str, facts: Mapping[str, Any], seconds: float | None) -> Iterable[str]:
    rows, written = facts["rows"], facts["rows_written"]
    yield f"# {name}"
    yield (
        f"{written:,} of {rows:,} rows written ({format_share(written, rows)}), {facts['rows_with_system_message']:,} "
        f"of them with a system message, by {facts['model']}. Prompt version: {facts['prompt_version']}."
    )
    yield from report.warning_section(facts)
    yield "## Rows"
    phases = {_PHASES[phase]: count for phase, count in facts["rows_through_phase"].items()} | {"written": written}
    yield format_table(
        ("phase", "rows", "share of all"),
        [(phase, f"{count:,}", format_share(count, rows)) for phase, count in phases.items()],
    )
    yield from count_section("Dropped rows", "reason", facts["left_out"], rows, "share of all")
    yield from report.failure_section(facts)
    yield from count_section(
        "Events",
        "event",
        facts["events"],
        rows,
        "per row",
        "Over all tries and turns, including those of dropped rows.",
    )
    yield "## Tags"
    yield (
        "Verdicts are counted for all eight tags of every judged message, whether or not it has the tag: of a row's "
        "last try, and once for each turn of a longer conversation. So are repairs and dropped texts. `reminded, with "
        "tag`: written rows whose prompt reminded of the tag, and how many of them have it."
    )
    head = ("tag", "rows", "share", "Good", "Bad", "None", "no verdict", "removed phrases", "reminded, with tag")
    yield format_table(head, [_tag_row(tag, facts["tags"][tag]) for tag in TAGS])
    yield "![share of messages with each tag, and of verdicts](tags.png)"
    yield from count_section("Repairs of generated messages", "error", facts["repairs"])
    yield from count_section("Dropped texts of generated messages", "reason", facts["dropped"])
    unknown_tags = dict(list(facts["unknown_tags"].items())[:_UNKNOWN_TAGS_SHOWN])
    yield from count_section("Tags that are none of the eight", "tag", unknown_tags)
    yield from count_section("Constraints", "kind", facts["constraints"], written, "share of written")
    yield from pressure_section(facts.get("pressure"))
    yield "## Answers"
    yield _describe_answers(facts["characters"])
    if facts["characters"]["rows_answered_anew"]:
        yield "![length of new answers over the original ones](lengths.png)"
    yield from report.usage_section(facts, seconds)
    yield "## Samples"
    yield "Drawn with the seed, in the order of the sources."
    yield from map(_sample_section, facts["samples"])


def _tag_row(tag: str, counts: Mapping[str, Any]) -> tuple[str, ...]:
    verdicts = (f"{counts['verdicts'][name]:,}" for name in ("Good", "Bad", "None", "missing"))
    removed = ", ".join(f"{count:,} {reason}" for reason, count in counts["phrases_removed"].items())
    reminded = f"{counts['reminded']:,}, {counts['reminded_and_there']:,}" if counts["reminded"] else ""
    share = "" if counts["share"] is None else f"{counts['share']:.1%}"
    return (tag, f"{counts['rows']:,}", share, *verdicts, removed, reminded)


def _describe_answers(characters: Mapping[str, Any]) -> str:
    if not characters["rows_answered_anew"]:
        return "No row was written with new answers."
    return (
        f"{characters['rows_answered_anew']:,} rows have new answers. In total these have {characters['ratio']:.2f} "
        f"times the characters of the original ones ({characters['new_answers']:,} over "
        f"{characters['original_answers']:,}; the mean ratio of a row is {characters['mean_of_ratios']:.2f}). "
        f"System messages have {characters['system_message_mean']:,.0f} characters on average."
    )


def _sample_section(sample: Mapping[str, Any]) -> str:
    parts = [f"### {sample['source']}"]
    if sample["annotated"]:
        parts.append(code_block(sample["annotated"]))
    turns = [turn for turn in sample["conversation"] if turn["role"] != "system"]  # shown above, with its tags
    parts += [f"**{turn['role']}**\n\n{code_block(turn['content'])}" for turn in turns]
    return "\n\n".join(parts)


def plot_tags(facts: Mapping[str, Any], path: Path) -> None:
    """Plot the share of messages with each tag, beside the shares of Bad and None verdicts."""
    tags = [facts["tags"][tag] for tag in TAGS]
    messages = facts["rows_with_system_message"] or 1
    judged = max(1, *(sum(counts["verdicts"].values()) for counts in tags))
    series = [
        BarSeries([(counts["rows"] / messages, None, None) for counts in tags], "messages with the tag"),
        *(
            BarSeries(
                [(counts["verdicts"][verdict] / judged, None, None) for counts in tags], f"judged {verdict}", color
            )
            for verdict, color in (("Bad", "tab:red"), ("None", "lightgray"))
        ),
    ]
    with bar_plot(path, "Tags of the system messages", "share of messages, of verdicts", TAGS, series) as axes:
        axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)


def plot_length_ratios(facts: Mapping[str, Any], path: Path) -> None:
    """Plot a histogram of the rows by the ratio of characters, new answers over original ones."""
    histogram = facts["characters"]["histogram_of_ratios"]
    edges = histogram["edges"]
    edges = [edges[0] ** 2 / edges[1], *edges, edges[-1] ** 2 / edges[-2]]
    with new_figure(path, 10, 4) as (_, axes):
        axes.stairs(histogram["rows"], edges, fill=True)
        axes.set_xscale("log", base=2)
        labels = {2.0**power: f"1/{2**-power}" if power < 0 else str(2**power) for power in range(-4, 5)}
        axes.set_xticks(list(labels), list(labels.values()))
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title("Lengths of the new answers")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("characters of the new answers / of the original ones")
        axes.set_ylabel("rows")
        axes.grid(alpha=0.3)
