"""Report of SysBench: the section of report.md and the plot of its curves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.formatting import format_estimate
from train.evaluation.judge_report import missing_verdict_lines
from train.evaluation.turns.curves import draw_curve, turn_panels
from train.evaluation.turns.sysbench_figures import ALIGNMENTS, MEASURES, ROUNDS
from train.evaluation.turns.sysbench_rows import TURNS
from train.formatting import format_count
from train.reporting.markdown import format_table, quote_line
from train.reporting.plots import COLOR
from train.resampling import explain_missing_intervals, missing_interval_reason

HEADING = "## SysBench"
PUBLISHED_JUDGE = "gpt-4o-2024-05-13"
_CURVES = (("isr_by_turn", "at turn k", "--o", 0.5), ("holds_through", "in all turns 1 to k", "-o", 1.0))

Record = Mapping[str, Any]


def section(record: Record, rows: Sequence[Record]) -> str:
    """Return the section of report.md: settings, figures, curves, missing verdicts, one conversation."""
    groups = {"all": record} | {f"{name} conversations": record["by_rounds"][name] for name in ROUNDS.values()}
    groups |= {f"{name} turns": record["by_alignment"][name] for name in ALIGNMENTS.values()}
    curves = {"turns that hold": record["isr_by_turn"], "every turn so far holds": record["holds_through"]}
    curves |= {f"the same, {name}": record["by_rounds"][name]["holds_through"] for name in ROUNDS.values()}
    types = record["by_type"].items()
    lines = [HEADING, "", f"Model: `{record['model']}`.", "", _settings(record), ""]
    lines += [_table(("", *MEASURES.values()), {name: map(of.get, MEASURES) for name, of in groups.items()}), ""]
    lines += [_table(("turn", *map(str, range(1, TURNS + 1))), curves), "", _half(record), ""]
    lines += [_table(("criteria of type", MEASURES["csr"]), {type: [of["csr"]] for type, of in types})] * bool(types)
    lines += ["", *_missing(record["missing"])]
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "conversations")) else []
    return "\n".join([*lines, "", "![SysBench](sysbench.png)", "", *_sample(rows)]) + "\n"


def _table(header: tuple[str, ...], rows: Mapping[str, Iterable[Mapping[str, Any] | None]]) -> str:
    return format_table(header, [(name, *map(_share, shares)) for name, shares in rows.items()])


def _settings(record: Record) -> str:
    data, judge = record["data"], record["judge"]
    part = f" (the first {data['conversations']:,} of {data['of']:,}: not the complete set)"
    part *= data["conversations"] < data["of"]
    history = "its own answers" if record["history"] == "own" else "the reference answers"
    text = f"{format_count(data['conversations'], 'conversation')} of {TURNS} turns of {data['file']}{part}, with "
    text += f"{history} as history, judged by {judge['model']} (version {judge['prompt_version']} of the question). "
    text += f"A turn holds if all its criteria are met. SysBench's own question to its judge, {PUBLISHED_JUDGE}, is "
    return text + "Chinese; this one is ours: figures under the two are not comparable."


def _share(share: Mapping[str, Any] | None) -> str:
    """Return a share in percent, or a dash without values."""
    if share is None:
        return "–"
    reason = missing_interval_reason(share["interval"], share["groups"])
    return format_estimate(share["mean"], share["low"], share["high"], reason, scale=100, unit=" %")


def _half(record: Record) -> str:
    """Return a sentence on the mean run and on the turn by which half of the conversations have broken."""
    if record["ssr"] is None:
        return "No conversation has a verdict on every turn."
    turn = record["half"]["turn"]
    when = f"Half of the conversations have broken by turn {turn}" if turn else f"More than half hold all {TURNS} turns"
    return f"On average the first {TURNS * record['ssr']['mean']:.2f} of {TURNS} turns hold without a break. {when}."


def _missing(missing: Record) -> list[str]:
    """Return lines on turns without an answer or a verdict, and on the endings of answers."""
    endings = ", ".join(f"{count:,} {how}" for how, count in missing["endings"].items())
    conversations = format_count(missing["conversations_without_run"], "conversation")
    lines = [
        f"Turns without a verdict: {missing['turns_without_verdict']:,}, in no mean. The other turns of their "
        f"{conversations} count in CSR and ISR; SSR and the shares of every turn so far leave these conversations out. "
        f"Answers: {endings}."
    ]
    lines += [f"- no answer, {format_count(count, 'time')}: {why}" for why, count in missing["why_no_answer"].items()]
    return [*lines, "", *missing_verdict_lines(missing["judge"])]


def _sample(rows: Sequence[Record]) -> list[str]:
    """Return the first conversation that breaks, or the first of all, turn by turn."""
    broken = next((row["system_id"] for row in rows if row["holds"] is False), rows[0]["system_id"])
    chosen = [row for row in rows if row["system_id"] == broken]
    lines = [f"Conversation {broken}:", "", f"- system: {quote_line(chosen[0]['system'])}"]
    for row in chosen:
        verdict = {True: "holds", False: "does not hold", None: "no verdict"}[row["holds"]]
        unmet = [each["text"] for each in row["criteria"] if each["met"] is False]
        lines += [f"- turn {row['turn']}, user: {quote_line(row['user'])}"]
        lines += [f"  - answer ({verdict}): {quote_line(row['answer'] or row['why'] or '')}"]
        lines += [f"  - not met: {quote_line(text)}" for text in unmet]
    return lines


def plot_curves(records: Mapping[str, Record], path: Path) -> None:
    """Save a PNG with a panel for each record (title -> sysbench.json): shares that hold at turn k, and up to it."""
    with turn_panels(path, list(records), TURNS, "SysBench: does the system message hold?") as panels:
        for record, panel in zip(records.values(), panels, strict=True):
            for key, label, style, alpha in _CURVES:
                shares = [share and (share["mean"], share["low"], share["high"]) for share in record[key]]
                draw_curve(panel, shares, label=label, fmt=style, color=COLOR, alpha=alpha)
