"""TODO: train.evaluation.ifeval.rows.report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.evaluation.ifeval.checkers import ConstraintVerdict
from train.evaluation.ifeval.metrics import MEASURES, Share
from train.evaluation.ifeval.rows import (
    IFEvalRow,
)
from train.formatting import format_count
from train.reporting.plots import error_bars, load_pyplot
from train.resampling import explain_missing_intervals

if TYPE_CHECKING:
    from train.resampling import Estimate


HEADING = "## Constraints that a program can check"


@dataclass(frozen=True)
class CheckedAnswer:
    """What came back for one row; `text` without reasoning, None where there was no answer, and `how` it ended.

    `why`: the reason where there was no answer; `advice`: the option to change, where the server's error is about one.
    """

    text: str | None
    how: str
    verdict: ConstraintVerdict
    why: str | None = None
    advice: str = ""


def about_unanswered(
    asked: dict[str, list[IFEvalRow]], found: dict[str, list[CheckedAnswer]], places: dict[str, str]
) -> str | None:
    """How many prompts got no answer, and why the first of them; None where all got one."""
    without = [
        f"(key {row.key}, {places[turn]}): {' '.join(one.why.split())[:500]}"
        for turn, rows in asked.items()
        for row, one in zip(rows, found[turn], strict=True)
        if one.why
    ]
    if not without:
        return None
    prompts = f"{len(without):,} prompt{'s' if len(without) > 1 else ''} got no answer and count as following nothing"
    return f"{prompts}; the first {without[0]}"


def percent(share: Share) -> str:
    """`12.3 % [10.0, 14.5]`, or `50.0 % (n = 2)`."""
    shown = f"{100 * share.value:.1f} %"
    if share.low is None or share.high is None:
        return f"{shown} ({share.missing})"
    return f"{shown} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def points(gap: "Estimate") -> str:
    """`-12.3 [-14.5, -10.0]`, in percentage points, or `-50.0 (n = 2)`."""
    shown = f"{100 * gap.mean:+.1f}"
    if gap.low is None or gap.high is None:
        return f"{shown} ({gap.missing})"
    return f"{shown} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def section(
    record: dict[str, Any],
    places: dict[str, str],
    overall: dict[str, dict[str, Share]],
    of_rule: dict[str, dict[str, dict[str, Share]]],
    gap: "dict[str, Estimate] | None",
    unanswered: str | None = None,
) -> str:
    """The section of report.md: how it was measured, what got no answer, the four measures, the rules."""
    data, decoding, checkers = record["data"], record["decoding"], record["checkers"]
    limit, temperature = decoding["max_new_tokens"], decoding["temperature"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    drawn = "the model's own temperature" if temperature is None else f"temperature {temperature:g}"
    asked = f"{format_count(data['prompts'], 'prompt')} with {format_count(data['constraints'], 'constraint')}"
    lines = [HEADING, "", f"{asked} of {data['file']}"]
    if data["left_out"]:
        lines[-1] += f"; left out, as officially: prompts with {' or '.join(data['left_out'])}"
    lines[-1] += (
        f". Answers {length} at {drawn}"
        f", checked by lm-eval {checkers['lm_eval']} ({checkers['sentences']}; langdetect's seed is 0)."
    )
    if data["drawn_at_random"]:
        keys = ", ".join(map(str, data["drawn_at_random"]))
        lines[-1] += f" The checkers put a random letter in the place of the one that these rows ask for: {keys}."
    for turn in overall:
        endings = record[turn]["endings"]
        lines[-1] += f" Constraints {places[turn]}: " + ", ".join(f"{n:,} {how}" for how, n in endings.items()) + "."
    lines += ["", unanswered] if unanswered else []
    head = "".join(f" {places[turn]} |" for turn in overall)
    lines += ["", f"| |{head}" + (" system less user, points | p |" if gap else "")]
    lines += ["|---|" + "---|" * (len(overall) + 2 * bool(gap))]
    for name, what in MEASURES.items():
        cells = [percent(one[name]) for one in overall.values()]
        cells += [points(gap[name]), f"{gap[name].p:.4f}"] if gap else []
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    if data["same_in_both_turns"]:
        same = f"{data['same_in_both_turns']:,} of {format_count(data['prompts'], 'prompt')}"
        lines += ["", f"{same} are those of the control word for word, as merge_into_user makes them: no gap is there."]
    first = next(iter(of_rule.values()))
    lines += ["", "By rule, strict:", "", f"| rule | constraints |{head}", "|---|---|" + "---|" * len(overall)]
    for rule, one in first.items():
        cells = [percent(found[rule]["strict"]) for found in of_rule.values()]
        lines.append(f"| {rule} | {one['strict'].of} | " + " | ".join(cells) + " |")
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "prompts")) else []
    return "\n".join(lines) + "\n\n![constraints followed](ifeval.png)\n"


def draw(
    places: dict[str, str],
    overall: dict[str, dict[str, Share]],
    of_rule: dict[str, dict[str, dict[str, Share]]],
    path: Path,
) -> None:
    """The four measures and the strict share of each rule, with intervals, a bar for each turn, as a PNG."""
    pyplot = load_pyplot()
    bars: dict[str, dict[str, Share]] = {
        turn: {name.replace("_", ", "): share for name, share in overall[turn].items()}
        | {rule: found["strict"] for rule, found in of_rule[turn].items()}
        for turn in overall
    }
    names = list(next(iter(bars.values())))
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(names) + 1.6), dpi=100, layout="constrained")
    height = 0.8 / len(bars)
    for number, (turn, found) in enumerate(bars.items()):
        rows = [row + (number - (len(bars) - 1) / 2) * height for row in range(len(names))]
        values = [found[name].value for name in names]
        axes.barh(
            rows,
            values,
            height,
            xerr=error_bars((found[name].value, found[name].low, found[name].high) for name in names),
            label=places[turn],
            color="tab:blue" if turn == "system" else "lightgray",
            capsize=2,
        )
    axes.set_yticks(range(len(names)), names)
    axes.axhline(len(MEASURES) - 0.5, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share that is followed (95 %)")
    axes.margins(y=0.01)
    figure.suptitle("Constraints that are followed", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
