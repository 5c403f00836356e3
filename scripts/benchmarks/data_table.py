"""Record and table of `benchmark.py data`."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.data_contenders import CONTENDERS

BARE = ("tokenizer", "fastokens")
"""Contenders that only turn texts into ids: they label, pack and store nothing."""
_RATIOS = (("ours", "trl"), ("ours", "trl-N"), ("ours-again", "trl-N"), ("ours", "tokenizer"), ("ours", "fastokens"))

Figures = dict[str, Any]


def build_record(
    settings: Figures, rows: list[Figures], measurements: list[Figures], differences: list[Figures]
) -> dict[str, Any]:
    """Return the record: all measurements, with medians, ratios and memory growth."""
    medians = compute_medians(settings["max_length"], measurements)
    return {
        "settings": settings,
        "rows": rows,
        "medians": medians,
        "ratios": _compute_ratios(medians) if len(rows) == 1 else {},
        "growth": _compute_growth(medians) if len(rows) > 1 else {},
        "differences": differences,
        "measurements": measurements,
    }


def compute_medians(max_length: int, measurements: list[Figures]) -> list[Figures]:
    """Return the medians of each contender and number of rows, in the order of CONTENDERS.

    `tokens_lost` compares with a bare tokenizer, and is None if none was measured.
    """
    lines = []
    for rows in sorted({run["rows_in"] for run in measurements}):
        by_name = {
            name: [run for run in measurements if (run["contender"], run["rows_in"]) == (name, rows)]
            for name in CONTENDERS
        }
        tokens = next((runs[0]["tokens"] for name, runs in by_name.items() if name in BARE and runs), None)
        for name, runs in by_name.items():
            if not runs:
                continue
            keys = [key for key in runs[0] if key not in ("contender", "repetition")]
            line = {"contender": name, **{key: statistics.median(run[key] for run in runs) for key in keys}}
            line["fastest"], line["slowest"] = (edge(run["seconds"] for run in runs) for edge in (min, max))
            line["rows_per_second"] = rows / line["seconds"]
            line["tokens_per_second"] = line["tokens"] / line["seconds"]
            line["filling"] = line["tokens"] / (line["sequences"] * max_length)
            line["rows_lost"] = rows - line["rows"]
            line["tokens_lost"] = None if tokens is None else tokens - line["tokens"]
            lines.append(line)
    return lines


def _compute_ratios(medians: list[Figures]) -> dict[str, float]:
    """Return by how many times the first contender is faster than the second."""
    seconds = {line["contender"]: line["seconds"] for line in medians}
    pairs = [pair for pair in _RATIOS if seconds.keys() >= set(pair)]
    return {f"{first} / {second}": seconds[second] / seconds[first] for first, second in pairs}


def _compute_growth(medians: list[Figures]) -> dict[str, dict[str, float]]:
    """Return for each contender the change of peak memory from the fewest rows to the most, as a share."""
    growth = {}
    for name in dict.fromkeys(line["contender"] for line in medians):
        lines = [line for line in medians if line["contender"] == name]
        growth[name] = {key: lines[-1][key] / lines[0][key] - 1 for key in ("peak_memory", "peak_anonymous")}
    return growth


def format_table(record: dict[str, Any]) -> str:
    """Return the table, the ratios, the growth of memory, and the differences between contenders."""
    settings, medians = record["settings"], record["medians"]
    labels = {name: label.format(processes=settings["processes"]) for name, label in CONTENDERS.items()}
    lines = [
        "| | rows | seconds (range) | rows/s | tokens/s | peak memory | without file pages | on disk | filling "
        "| rows lost | tokens lost |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in medians:
        output = ["–"] * 4
        if line["contender"] not in BARE:
            lost = "–" if line["tokens_lost"] is None else f"{line['tokens_lost']:,.0f}"
            output = [format_size(line["disk"]), f"{line['filling']:.2%}", f"{line['rows_lost']:,.0f}", lost]
        cells = [
            labels[line["contender"]],
            f"{line['rows_in']:,}",
            f"{line['seconds']:.2f} ({line['fastest']:.2f}-{line['slowest']:.2f})",
            f"{line['rows_per_second']:,.0f}",
            f"{line['tokens_per_second']:,.0f}",
            format_size(line["peak_memory"]),
            format_size(line["peak_anonymous"]),
            *output,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for pair, ratio in record["ratios"].items():
        first, second = (labels[name] for name in pair.split(" / "))
        lines.append(f"- {first}: {ratio:.2f} times as fast as {second}")
    counts = [rows["count"] for rows in record["rows"]]
    lines += [
        f"- {labels[name]}, peak memory from {min(counts):,} to {max(counts):,} rows: {change['peak_memory']:+.0%}, "
        f"without file pages {change['peak_anonymous']:+.0%}"
        for name, change in record["growth"].items()
    ]
    lines += [f"- {_format_difference(difference, labels)}" for difference in record["differences"]]
    lines += [
        f"- {labels[line['contender']]}: {line['untrained_rows']:,.0f} rows have no trained token, as their answer was "
        "cut off"
        for line in medians
        if line["untrained_rows"] and line["contender"] not in BARE
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {settings['repeat']}, contenders in turns, each in a fresh process with empty caches; without "
            f"imports and loading the tokenizer. Tokenizer {Path(settings['tokenizer']).name}, template "
            f"{settings['template']}, max_length {settings['max_length']:,}, seed {settings['seed']}.",
        ]
    )


def _format_difference(difference: Figures, labels: dict[str, str]) -> str:
    first, second = labels[difference["first"]], labels[difference["second"]]
    compared = "ids" if difference["first"] in BARE else "ids and labels"
    if not difference["only_first"] and not difference["only_second"]:
        return f"{first} and {second}: the same {compared} in all {difference['same_rows']:,} rows"
    tokens = "; ".join(
        f"{token['token']!r} {token['occurrences']:+,}, trained {token['trained']:+,}"
        for token in difference["by_token"]
    )
    return (
        f"{first} and {second}: the same {compared} in {difference['same_rows']:,} rows, "
        f"{difference['only_first']:,} only in the first, {difference['only_second']:,} only in the second, which has "
        f"{difference['tokens']:+,} tokens and {difference['trained_tokens']:+,} trained ones; largest differences: "
        f"{tokens or 'none'}"
    )


def format_size(count: float) -> str:
    """Format bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
