"""Rows of a gain measurement: a record for each, and the rows that ignore their message.

The answer of such a row is no likelier under the row's own system message than under others: its gain is 0 or less.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from train.formatting import format_count
from train.reporting.markdown import format_table, quote_line
from train.reporting.plots import BASELINE_COLOR, COLOR, escape_label, new_figure

if TYPE_CHECKING:
    from train.data.sources.formats import Message
    from train.system_gain.metric import SystemGain
    from train.system_gain.variants import Label, Variants

_LISTED_ROWS = 20
_BARS = 40
"""Bars of the histogram over the gains of 98 % of the rows, at most."""


def row_records(rows: "Sequence[Variants]", measured: "Mapping[str, SystemGain]") -> Iterator[dict[str, Any]]:
    """Yield the line of gain_rows.jsonl of each row.

    Its place, the digest of its conversation (`train.data.min_gain` finds the row by it), the instruction that siblings
    share, and the measures of each model.
    """
    from train.data.tokens.table import digest_conversation
    from train.system_gain.metric import MEASURES

    for number, row in enumerate(rows):
        values = {
            name: dict(zip(MEASURES, gain.values[number].tolist(), strict=True)) for name, gain in measured.items()
        }
        digest = digest_conversation(row.conversation).hex()
        yield {"place": row.place, "conversation": digest, "instruction": row.instruction, **values}


def rows_section(rows: "Sequence[Variants]", measured: "Mapping[str, SystemGain]") -> str:
    """Return the part of the report on the rows that ignore their message.

    A table of their number, by label, for each model; and the rows of the smallest gain in the last model.
    """
    *_, (name, gain) = measured.items()
    gains = _gains(gain)
    ignoring = int((gains <= 0).sum())
    lines = [
        "### Rows that ignore their message",
        "",
        f"{ignoring:,} of {format_count(len(rows), 'row')} ({ignoring / len(rows):.1%}) have a gain of 0 or less with "
        f"`{name}`: the answer is no likelier under the row's own message than under others.",
        "",
        format_table(("of", "rows", *(f"gain of 0 or less: {model}" for model in measured)), _count(measured)),
    ]
    listed = [number for number in np.argsort(gains, kind="stable").tolist() if gains[number] <= 0][:_LISTED_ROWS]
    if listed:
        lines += ["", f"Those of the smallest gain ({len(listed):,}):", ""]
    for number in listed:
        row = rows[number]
        lines.append(f"- {row.place}: gain {gains[number]:+.3f} nats per token")
        lines += [f"  - {part}: {quote_line(text)}" for part, text in _quoted(row.conversation.messages)]
    return "\n".join(lines) + "\n"


def _gains(gain: "SystemGain") -> NDArray[np.float64]:
    from train.system_gain.metric import MEASURES

    return gain.values[:, MEASURES.index("gain")]


def _count(measured: "Mapping[str, SystemGain]") -> Iterator[tuple[str, ...]]:
    """Yield a line for all rows and for each group: its name, rows, and those with a gain of 0 or less per model."""
    first = next(iter(measured.values()))
    labels: list[Label | None] = [None, *first.groups]
    for label in labels:
        chosen = np.array([label is None or label in of_row for of_row in first.labels])
        counts = [int((_gains(gain)[chosen] <= 0).sum()) for gain in measured.values()]
        total = int(chosen.sum())
        of = "all rows" if label is None else " ".join(f"{label[0]}: {label[1]}".split())
        yield of, f"{total:,}", *(f"{count:,} ({count / total:.1%})" for count in counts)


def _quoted(messages: "Sequence[Message]") -> Iterator[tuple[str, str]]:
    """Yield the system message, the last trained answer and the user message before it, each with its name."""
    from train.data.sources.loss_weights import weight_of
    from train.system_gain.variants import split_system_message

    system, turns = split_system_message(list(messages))
    answer = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant" and weight_of(turn))
    users = [turn["content"] for turn in turns[:answer] if turn["role"] == "user"]
    yield "system", system
    if users:
        yield "user", users[-1]
    yield "answer", turns[answer]["content"] or json.dumps(turns[answer].get("tool_calls"), ensure_ascii=False)


def count_bars(gains: Sequence[NDArray[np.float64]]) -> tuple[float, list[Counter[int]]]:
    """Return the width of a histogram's bars, and for each array the number of values in each bar.

    Bar n holds the values above (n - 1) * width up to n * width, so the bars up to 0 are the gains of 0 or less.
    """
    values = np.concatenate(gains)
    low, high = np.quantile(values, [0.01, 0.99])
    spread = max(float(high - low), 1e-3)
    exponent = np.floor(np.log10(spread / _BARS))
    width = next(step * 10**exponent for step in (1, 2, 5, 10) if step * 10**exponent * _BARS >= spread)
    return float(width), [Counter(np.ceil(of_model / width).astype(int).tolist()) for of_model in gains]


def plot_histogram(measured: "Mapping[str, SystemGain]", path: Path) -> None:
    """Save a PNG of the number of rows by their gain, for each model."""
    width, bars = count_bars([_gains(gain) for gain in measured.values()])
    colors = [BASELINE_COLOR, COLOR] if len(measured) == 2 else [COLOR]
    with new_figure(path, 9, 4) as (_, axes):
        for color, (name, counts) in zip(colors, zip(measured, bars, strict=True), strict=True):
            left = [(number - 1) * width for number in counts]
            axes.bar(left, list(counts.values()), width, align="edge", color=color, alpha=0.7, label=escape_label(name))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("gain over other system messages, nats per token (left of the line: the message is ignored)")
        axes.set_ylabel("rows")
        axes.set_title("System gain of the rows")
        axes.legend(frameon=False)
