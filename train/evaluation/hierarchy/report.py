"""Report of the hierarchy: the section of report.md and the plot."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.formatting import format_points, format_share
from train.evaluation.hierarchy.figures import MEASURES, SPLITS, Figures, Line, Shares, by
from train.evaluation.hierarchy.results_of_set import SetResults, TablePart
from train.formatting import format_count
from train.reporting.markdown import quote_line
from train.reporting.plots import BASELINE_COLOR, COLOR, BarSeries, Interval, bar_plot
from train.resampling import Estimate, explain_missing_intervals

HEADING = "## Does the system message hold?"
SAMPLES = ("conflict", "injected", "extraction", "permitted")
"""Settings with a sample in the report."""


def section(
    record: Mapping[str, Any], sets: Sequence[SetResults], parts: Sequence[TablePart], why_no_gap: str = ""
) -> str:
    """Return the section of report.md: the table of all sets, then the settings and details of each set.

    `why_no_gap`: why S-IFEval is not in the table, if it could be.
    """
    decoding = record["decoding"]
    limit, temperature = decoding["max_new_tokens"], decoding["temperature"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    sampling = "the model's own temperature" if temperature is None else f"temperature {temperature:g}"
    lines = [HEADING, "", f"Model: `{record['model']}`.", "", f"Answers {length} at {sampling}."]
    for of_set in sets:
        lines += ["", of_set.settings]
        lines += ["", of_set.warning] if of_set.warning else []
    lines += ["", *_table(parts)]
    lines += ["", why_no_gap] if why_no_gap else []
    lines += ["", "95 % intervals; rows of one question are one piece of evidence."]
    for of_set in sets:
        lines += ["", of_set.details] if of_set.details else []
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "questions")) else []
    return "\n".join(lines) + "\n\n![system messages that hold](hierarchy.png)\n"


def settings_of(data: Mapping[str, Any], split: str) -> str:
    """Return a paragraph on the rows of the built-in set."""
    counts = ", ".join(f"{count:,} {setting}" for setting, count in data["by_setting"].items())
    text = f"{format_count(data['rows'], 'row')} of the built-in set (version {data['version']}): {counts}"
    text += {"all": "", "seen": "; only messages that training may use", "held_out": "; only held-out messages"}[split]
    text += ". Held: the answer does what the system message says, by a program. Answered: it has the known answer."
    results = data["tool_results"]
    if results["in"] == "user turn":
        stand = format_count(results["rows"], "tool result", "stands", "stand")
        text += f" {stand} in the user's turn: {results['why'].rstrip('.')}."
    elif results["in"]:
        text += f" {format_count(results['rows'], 'tool result', 'is a turn of its own', 'are turns of their own')}."
    return f"{text} Answers: " + ", ".join(f"{count:,} {how}" for how, count in data["endings"].items()) + "."


def _table(parts: Sequence[TablePart]) -> list[str]:
    lines = [
        "| | rows | message held | question answered | both | held, minus reference (points) | p |",
        "|---|---:|---|---|---|---|---|",
    ]
    for part in parts:
        shares = [format_share(share) if share else "" for share in (part.held, part.answered, part.both)]
        difference = part.difference
        change = [format_points(difference), f"{difference.p:.4f}"] if difference else ["", ""]
        lines.append(f"| {' | '.join([part.name, f'{part.rows:,}', *shares, *change])} |")
    if any(part.name.endswith("secret kept") for part in parts):
        lines += ["", "Secret kept: of the answers that are not empty."]
    if any(part.name.startswith("S-IFEval") for part in parts):
        lines += [
            "",
            "S-IFEval: prompts whose constraints are all followed, strict; the difference is system minus user.",
        ]
    return lines


def details_of(figures: Figures, lines: Sequence[Line]) -> str:
    """Return the tables by tactic, split and rule, and samples of answers."""
    text = ["By tactic:", "", "| setting | tactic | rows | message held | question answered | both | refused |"]
    text += ["|---|---|---:|---|---|---|---:|"]
    for (setting, tactic), shares in figures.tactics.items():
        cells = [setting, tactic, f"{shares.rows:,}", *_measures(shares), f"{shares.refused:,}"]
        text.append(f"| {' | '.join(cells)} |")
    if ("permitted", "choice") in figures.tactics:
        text += [
            "",
            "choice: the message lets the user choose another form. A model that ignores messages holds these.",
        ]
    text += ["", "By split, message held and question answered:", ""]
    splits = [split for split in SPLITS if any(name == split for name, _ in figures.splits)]
    text += [f"| | {' | '.join(SPLITS[split] for split in splits)} |", "|---|" + "---|" * len(splits)]
    for setting in figures.settings:
        cells = [_both(figures.splits.get((split, setting))) for split in splits]
        text.append(f"| {setting} | {' | '.join(cells)} |")
    text += ["", "By rule, rows that held of all rows:", ""]
    text += [f"| rule | {' | '.join(figures.settings)} |", "|---|" + "---:|" * len(figures.settings)]
    for rule in sorted({rule for rule, _ in figures.rules}):
        cells = [_count(figures.rules.get((rule, setting))) for setting in figures.settings]
        text.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join([*text, *_samples(lines)])


def _samples(lines: Sequence[Line]) -> list[str]:
    """Return two answers of each setting under pressure, one that held and one that did not, each of another group."""
    text = []
    shown: set[str] = set()
    for setting, of_setting in by(lines, "setting").items():
        if setting not in SAMPLES:
            continue
        for held in (True, False):
            answered = [line for line in of_setting if line["held"] == held and line["answer"] is not None]
            line = next((line for line in answered if line["group"] not in shown), None)
            if line:
                shown.add(line["group"])
                turns = [(turn["role"], turn["content"]) for turn in line["messages"] if turn["content"]]
                verdict = f"{'held' if held else 'not held'}, {'answered' if line['answered'] else 'not answered'}"
                text += [f"- {setting}, {line['tactic']}: {verdict}"]
                text += [f"  - {role}: {quote_line(content)}" for role, content in turns]
                text += [f"  - answer: {quote_line(line['answer'])}"]
    return ["", "Samples:", "", *text] if text else []


def _measures(shares: Shares) -> list[str]:
    return [format_share(shares.measures[name]) for name in MEASURES]


def _both(shares: Shares | None) -> str:
    return format_share(shares.measures["both"]) if shares else ""


def _count(shares: Shares | None) -> str:
    return f"{round(shares.measures['held'].mean * shares.rows)} of {shares.rows}" if shares else ""


def plot_parts(parts: Sequence[TablePart], path: Path) -> None:
    """Save a PNG with the lines of the table: shares that held and shares that answered, with intervals."""
    series = [
        BarSeries([_interval(part.held) for part in parts], "message held", COLOR),
        BarSeries([_interval(part.answered) for part in parts], "question answered", BASELINE_COLOR),
    ]
    with bar_plot(
        path, "Does the system message hold?", "share of answers (95 %)", [p.name for p in parts], series
    ) as axes:
        axes.set_xlim(0, 1)


def _interval(share: Estimate | None) -> Interval:
    return (share.mean, share.low, share.high) if share else (math.nan, None, None)
