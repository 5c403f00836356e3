"""Report of IFEval: the section of report.md and the plot."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.evaluation.formatting import format_estimate, format_points
from train.evaluation.ifeval.metrics import MEASURES, Share
from train.formatting import format_count
from train.ifeval.checkers import ConstraintVerdict
from train.reporting.plots import BASELINE_COLOR, COLOR, BarSeries, bar_plot
from train.resampling import Estimate, explain_missing_intervals

HEADING = "## Constraints that a program can check"
SharesByRule = Mapping[str, Mapping[str, Mapping[str, Share]]]
"""Turn -> rule -> manner ("strict", "loose") -> share."""


@dataclass(frozen=True)
class CheckedAnswer:
    """The answer to one row with its verdict.

    - `text`: without reasoning; None if there is no answer. `how`: how it ended.
    - `why`: the reason for a missing answer. `advice`: the option to change, if the server's error is about one.
    """

    text: str | None
    how: str
    verdict: ConstraintVerdict
    why: str | None = None
    advice: str = ""


def _percent(share: Share) -> str:
    return format_estimate(share.value, share.low, share.high, share.missing, scale=100, unit=" %")


def section(
    record: Mapping[str, Any],
    places: Mapping[str, str],
    overall: Mapping[str, Mapping[str, Share]],
    by_rule: SharesByRule,
    gap: Mapping[str, Estimate] | None,
    unanswered: str = "",
) -> str:
    """Return the section of report.md: settings, unanswered prompts, the four measures, the rules."""
    lines = [HEADING, "", f"Model: `{record['model']}`.", "", _settings(record, places, overall)]
    lines += ["", unanswered] if unanswered else []
    head = "".join(f" {places[turn]} |" for turn in overall)
    lines += ["", f"| |{head}" + (" system minus user, points | p |" if gap else "")]
    lines += ["|---|" + "---|" * (len(overall) + 2 * bool(gap))]
    for name, description in MEASURES.items():
        cells = [_percent(of_turn[name]) for of_turn in overall.values()]
        cells += [format_points(gap[name]), f"{gap[name].p:.4f}"] if gap else []
        lines.append(f"| {description} | " + " | ".join(cells) + " |")
    data = record["data"]
    if data["same_in_both_turns"]:
        count = f"{data['same_in_both_turns']:,} of {format_count(data['prompts'], 'prompt')}"
        lines += ["", f"{count} equal those of the control, as merge_into_user makes them so: no gap is measured."]
    first = next(iter(by_rule.values()))
    lines += ["", "By rule, strict:", "", f"| rule | constraints |{head}", "|---|---|" + "---|" * len(overall)]
    for rule, of_rule in first.items():
        cells = [_percent(of_turn[rule]["strict"]) for of_turn in by_rule.values()]
        lines.append(f"| {rule} | {of_rule['strict'].of} | " + " | ".join(cells) + " |")
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "prompts")) else []
    return "\n".join(lines) + "\n\n![constraints followed](ifeval.png)\n"


def _settings(record: Mapping[str, Any], places: Mapping[str, str], overall: Mapping[str, Any]) -> str:
    """Return a paragraph on the data, the sampling settings, the checkers, and how the answers ended."""
    data, decoding, checkers = record["data"], record["decoding"], record["checkers"]
    limit, temperature = decoding["max_new_tokens"], decoding["temperature"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    sampling = "the model's own temperature" if temperature is None else f"temperature {temperature:g}"
    prompts = f"{format_count(data['prompts'], 'prompt')} with {format_count(data['constraints'], 'constraint')}"
    text = f"{prompts} of {data['file']}"
    if data["left_out"]:
        text += f"; skipped, as in the official scoring: prompts with {' or '.join(data['left_out'])}"
    text += f". Answers {length} at {sampling}"
    text += f", checked by lm-eval {checkers['lm_eval']} ({checkers['sentences']}; langdetect's seed is 0)."
    if data["drawn_at_random"]:
        keys = ", ".join(map(str, data["drawn_at_random"]))
        text += f" For these rows the checkers replace the requested letter by a random one: {keys}."
    for turn in overall:
        endings = record[turn]["endings"]
        text += f" Constraints {places[turn]}: " + ", ".join(f"{n:,} {how}" for how, n in endings.items()) + "."
    return text


def plot_shares(
    places: Mapping[str, str],
    overall: Mapping[str, Mapping[str, Share]],
    by_rule: SharesByRule,
    path: Path,
) -> None:
    """Save a PNG of the four measures and the strict share of each rule, with intervals, a bar for each turn."""
    bars = {
        turn: {name.replace("_", ", "): share for name, share in overall[turn].items()}
        | {rule: of_rule["strict"] for rule, of_rule in by_rule[turn].items()}
        for turn in overall
    }
    names = list(next(iter(bars.values())))
    series = [
        BarSeries(
            [(of_turn[name].value, of_turn[name].low, of_turn[name].high) for name in names],
            places[turn],
            COLOR if turn == "system" else BASELINE_COLOR,
        )
        for turn, of_turn in bars.items()
    ]
    with bar_plot(path, "Constraints that are followed", "share that is followed (95 %)", names, series) as axes:
        axes.axhline(len(MEASURES) - 0.5, color="black", linewidth=0.8)
        axes.set_xlim(0, 1)
