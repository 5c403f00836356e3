"""Report of conversations of several turns: the section of report.md and the curves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.evaluation.answer_endings import summarize_unanswered
from train.evaluation.formatting import format_estimate
from train.evaluation.turns.curves import draw_curve, turn_panels
from train.evaluation.turns.figures import ALL, KINDS, VARIANTS, JudgedTurns, of_kind
from train.formatting import format_count
from train.reporting.markdown import quote_line
from train.resampling import explain_missing_intervals, missing_interval_reason

HEADING = "## Does the system message hold over several turns?"
_COLORS = {"plain": "tab:blue", "push_back": "tab:red"}
_OFFSETS = {"plain": -0.03, "push_back": 0.03}
"""Shifts to the side in turns: the curves share their first turns."""
_CURVES = (("held", "--", "at turn k"), ("held_through", "-", "in all turns 1 to k"))
_HISTORIES = {"own": "the model's own answers", "reference": "reference answers, which obey the rule"}


def describe_unanswered(judged: Sequence[JudgedTurns]) -> str:
    """Return the number of turns without an answer and the first reason; empty if all turns got one."""
    failures = [
        (f"{each.row.key}, {VARIANTS[each.variant]}, turn {number}", turn.why)
        for each in judged
        for number, turn in enumerate(each.turns, 1)
        if turn.why
    ]
    missing = sum(turn.text is None for each in judged for turn in each.turns)
    return summarize_unanswered("turn", "count as not held", failures, missing - len(failures))


def section(record: Mapping[str, Any], judged: Sequence[JudgedTurns], unanswered: str = "") -> str:
    """Return the section of report.md: settings, the turns, run lengths, kinds and rules, and a sample."""
    turns = record["data"]["turns"]
    lines = [
        HEADING,
        "",
        f"Model: `{record['model']}`.",
        "",
        _settings(record),
        *(["", unanswered] if unanswered else []),
    ]
    header = ["", *(f"turn {turn}" for turn in range(1, turns + 1))]
    lines += ["", *_table(header, _rows_by_turn(record))]
    lines += ["", *_table(["", *(VARIANTS[variant] for variant in _variants(record)), *_difference_header(record)],
                          _rows_of_runs(record, turns))]  # fmt: skip
    lines += ["", f"By kind, at turn {turns} and in all turns:", "", *_kinds(record, turns)]
    lines += ["", "By rule, turns and conversations that hold all of them:", "", *_rules(record)]
    lines += ["", "95 % intervals over rules: conversations of one rule are not treated as independent."]
    lines += explain_missing_intervals("\n".join(lines), "rules")
    lines += ["", "![shares that hold by turn](turns.png)", "", *_sample(judged)]
    return "\n".join(lines) + "\n"


def _settings(record: Mapping[str, Any]) -> str:
    data, decoding = record["data"], record["decoding"]
    kinds = ", ".join(f"{count:,} of {KINDS[kind]}" for kind, count in data["by_kind"].items())
    text = f"{format_count(data['conversations'], 'conversation')} ({kinds}) of {format_count(data['turns'], 'turn')}"
    if data["push_back_at"]:
        text += f", each also with a push-back: in turn {data['push_back_at']} the user asks to drop the rule"
    limit, temperature = decoding["max_new_tokens"], decoding["temperature"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    sampling = "the model's own temperature" if temperature is None else f"temperature {temperature:g}"
    text += f". History: {_HISTORIES[record['history']]}. Answers {length} at {sampling}, judged by a program."
    names = {"plain": " without one" if data["push_back_at"] else "", "push_back": " with a push-back"}
    for variant in _variants(record):
        endings = ", ".join(f"{count:,} {how}" for how, count in record[variant]["endings"].items())
        text += f" Turns{names[variant]}: {endings}."
    return text


def _variants(record: Mapping[str, Any]) -> list[str]:
    return [variant for variant in VARIANTS if variant in record]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _rows_by_turn(record: Mapping[str, Any]) -> list[list[str]]:
    labels = {"held": "holds", "held_through": "holds, and all turns before", "answered": "question answered"}
    rows = []
    for measure, label in labels.items():
        for variant in _variants(record):
            shares = record[variant][ALL][measure]
            rows.append([f"{VARIANTS[variant]}: {label}", *map(_percent, shares)])
        if "difference" in record:
            cells = [_points(estimate) if estimate else "" for estimate in record["difference"][ALL][measure]]
            rows.append([f"difference in points: {label}", *cells])
    for variant in _variants(record):
        for measure, label in (("gain", "another rule's message"), ("gain_over_none", "no message")):
            if "gain" in record[variant]:
                cells = [_number(estimate, 3, "+") for estimate in record[variant]["gain"][measure]]
                rows.append([f"{VARIANTS[variant]}: system gain over {label}, nats per token", *cells])
    return rows


def _difference_header(record: Mapping[str, Any]) -> list[str]:
    return ["difference", "p"] if "difference" in record else []


def _rows_of_runs(record: Mapping[str, Any], turns: int) -> list[list[str]]:
    runs = [f"turns held from the first without a break, of {turns} (SSR)"]
    halves = ["turn by which half have dropped the rule"]
    for variant in _variants(record):
        of_all = record[variant][ALL]
        runs.append(f"{_number(of_all['run_length'], 2)} = {of_all['run_share']:.1%}")
        halves.append(_half(of_all, turns))
    if "difference" in record:
        difference = record["difference"][ALL]["run_length"]
        runs += [_number(difference, 2, "+"), f"{difference['p']:.4f}"]
        halves += ["", ""]
    return [runs, halves]


def _half(figures: Mapping[str, Any], turns: int) -> str:
    """Return `3 [2, none]`: none = not within the turns."""
    turn, low, high = (figures["half"][name] or "none" for name in ("turn", "low", "high"))
    if turn == low == "none":
        return f"none within {turns}"
    return f"{turn} [{low}, {high}]" if figures["held_through"][0]["low"] is not None else str(turn)


def _kinds(record: Mapping[str, Any], turns: int) -> list[str]:
    header, rows = ["", "conversations"], []
    for variant in _variants(record):
        header += [f"{VARIANTS[variant]}: turn {turns}", "all turns", "SSR"]
    for kind, label in KINDS.items():
        if kind in record["plain"]:
            cells = [label, f"{record['plain'][kind]['conversations']:,}"]
            for variant in _variants(record):
                of_this = record[variant][kind]
                cells += [_percent(of_this["held"][-1]), _percent(of_this["held_through"][-1])]
                cells += [_number(of_this["run_length"], 2)]
            rows.append(cells)
    return _table(header, rows)


def _rules(record: Mapping[str, Any]) -> list[str]:
    header, rows = ["rule", "conversations"], []
    for variant in _variants(record):
        header += [f"{VARIANTS[variant]}: turns", "conversations"]
    for rule, of_plain in record["plain"]["by_rule"].items():
        cells = [rule, f"{of_plain['conversations']:,}"]
        for variant in _variants(record):
            of_rule = record[variant]["by_rule"][rule]
            cells += [f"{of_rule['held']:.0%}", f"{of_rule['held_through']:.0%}"]
        rows.append(cells)
    return _table(header, rows)


def _sample(judged: Sequence[JudgedTurns]) -> list[str]:
    """Return a conversation with its verdicts: the first that breaks after its first turn, or else the first."""
    variant = "push_back" if of_kind(judged, "push_back") else "plain"
    candidates = of_kind(judged, variant)
    shown = next((each for each in candidates if 0 < each.run_length < len(each.turns)), candidates[0])
    lines = [f"A conversation ({shown.row.key}):", "", f"- system: {quote_line(shown.conversation.message)}"]
    for user, turn in zip(shown.conversation.user_turns, shown.turns, strict=True):
        verdicts = f"{'holds' if turn.held else 'does not hold'}, {'answered' if turn.answered else 'not answered'}"
        answer = f"({verdicts}): {quote_line(turn.text)}" if turn.text else f"({turn.how})"
        lines += [f"- user: {quote_line(user)}", f"  - answer {answer}"]
    return lines


def _percent(estimate: Mapping[str, Any]) -> str:
    return _format(estimate, scale=100, unit=" %")


def _points(estimate: Mapping[str, Any]) -> str:
    return _format(estimate, scale=100, sign="+")


def _number(estimate: Mapping[str, Any], digits: int, sign: str = "") -> str:
    return _format(estimate, digits=digits, sign=sign)


def _format(estimate: Mapping[str, Any], **options: Any) -> str:
    missing = missing_interval_reason(estimate["interval"], estimate["groups"])
    return format_estimate(estimate["mean"], estimate["low"], estimate["high"], missing, **options)


def plot_curves(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Save a PNG with a panel for each record (title -> turns.json): shares that hold at turn k and in all up to k."""
    turns = max(record["data"]["turns"] for record in records.values())
    with turn_panels(path, list(records), turns, "Does the system message hold?") as panels:
        for record, panel in zip(records.values(), panels, strict=True):
            for variant in _variants(record):
                for measure, style, label in _CURVES:
                    shares = [(share["mean"], share["low"], share["high"]) for share in record[variant][ALL][measure]]
                    draw_curve(
                        panel,
                        shares,
                        offset=_OFFSETS[variant],
                        fmt=f"{style}o",
                        color=_COLORS[variant],
                        alpha=0.5 if measure == "held" else 1,
                        label=f"{VARIANTS[variant]}: {label}",
                    )
            if at := record["data"]["push_back_at"]:
                panel.axvline(at, color="black", linewidth=0.8, linestyle=":", label="turn of the push-back")
