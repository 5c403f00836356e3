"""Report of SysBench: the section of report.md and the plot of its curves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.formatting import format_estimate
from train.evaluation.judge_report import missing_verdict_lines
from train.evaluation.turns.sysbench_figures import ALIGNMENTS, MEASURES, ROUNDS
from train.evaluation.turns.sysbench_rows import TURNS
from train.formatting import format_count
from train.reporting.markdown import format_table
from train.reporting.plots import error_bars, escape_math, new_figure
from train.resampling import explain_missing_intervals, missing_interval_reason

HEADING = "## SysBench"
PUBLISHED_JUDGE = "gpt-4o-2024-05-13"
_LONGEST = 400

Record = Mapping[str, Any]


def section(record: Record, rows: Sequence[Record]) -> str:
    """Return the section of report.md: settings, figures, curves, missing verdicts, one conversation."""
    groups = {"all": record} | {f"{name} conversations": record["by_rounds"][name] for name in ROUNDS.values()}
    groups |= {f"{name} turns": record["by_alignment"][name] for name in ALIGNMENTS.values()}
    curves = {"turns that hold": record["isr_by_turn"], "every turn so far holds": record["holds_through"]}
    curves |= {f"the same, {name}": record["by_rounds"][name]["holds_through"] for name in ROUNDS.values()}
    types = record["by_type"].items()
    lines = [HEADING, "", _settings(record), ""]
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
    lines = [f"Conversation {broken}:", "", f"- system: {_quoted(chosen[0]['system'])}"]
    for row in chosen:
        verdict = {True: "holds", False: "does not hold", None: "no verdict"}[row["holds"]]
        unmet = [each["text"] for each in row["criteria"] if each["met"] is False]
        lines += [f"- turn {row['turn']}, user: {_quoted(row['user'])}"]
        lines += [f"  - answer ({verdict}): {_quoted(row['answer'] or row['why'] or '')}"]
        lines += [f"  - not met: {_quoted(text)}" for text in unmet]
    return lines


def _quoted(text: str) -> str:
    """Return `text`, or its beginning, on one line of Markdown."""
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return "`" + shown.replace("`", "'").replace("\n", " ⏎ ") + "`"


def plot(record: Record, path: Path) -> None:
    """Save a PNG of the share that holds at each turn, and of those that hold every turn so far, with intervals."""
    curves = {"the turn holds (ISR)": record["isr_by_turn"], "every turn so far holds": record["holds_through"]}
    with new_figure(path, 7, 4.5) as (figure, axes):
        for offset, (label, curve) in enumerate(curves.items()):
            points = [(turn, share) for turn, share in enumerate(curve, 1) if share]
            turns = [turn + 0.04 * offset for turn, _ in points]  # so that the error bars stand side by side
            intervals = [(share["mean"], share["low"], share["high"]) for _, share in points]
            means = [mean for mean, _, _ in intervals]
            axes.errorbar(turns, means, error_bars(intervals), fmt="o-", capsize=3, label=label)
        axes.set(ylim=(0, 1.02), xlabel="turn", ylabel="share of conversations (95 %)")
        axes.set_xticks(range(1, TURNS + 1))
        axes.set_title(escape_math(f"SysBench: {record['model']}"), fontsize=11)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
