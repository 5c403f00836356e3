"""Tables of `benchmark.py sysgen`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "bare": "the server's limit, asked by a bare client",
    "ours": "janus-sft, scripts/sysgen.py",
    "distilabel": "distilabel 1.5.3, input_batch_size {input_batch_size}",
}
_MEDIANS = (
    *("rows", "seconds", "process_seconds", "cpu_seconds", "server_cpu_seconds", "peak_memory", "most_at_once"),
    "too_many",
)


def compute_medians(runs: Sequence[Mapping[str, Any]], ideal: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return the medians of each contender and number of rows.

    `ideal`: seconds by number of rows. `times_the_ideal` is None if the server has no latency.
    """
    lines = []
    for contender, rows_in in dict.fromkeys((run["contender"], run["rows_in"]) for run in runs):
        own = [run for run in runs if (run["contender"], run["rows_in"]) == (contender, rows_in)]
        line: dict[str, Any] = {"contender": contender, "rows_in": rows_in}
        line |= {key: statistics.median(run[key] for run in own) for key in _MEDIANS}
        for key in ("seconds", "peak_memory"):
            line |= {f"least_{key}": min(run[key] for run in own), f"most_{key}": max(run[key] for run in own)}
        line["requests_per_second"] = statistics.median(sum(run["answered"].values()) / run["seconds"] for run in own)
        line["times_the_ideal"] = line["seconds"] / ideal[rows_in] if ideal[rows_in] else None
        lines.append(line)
    return lines


def format_table(record: Mapping[str, Any]) -> str:
    """Return the table of speed or of memory, the failures and the settings."""
    settings = record["settings"]
    lines = _format_memory(record) if settings["only_memory"] else _format_speed(record)
    if record["failures"]:
        lines += ["", *(f"- {name}: {reason}" for name, reason in record["failures"].items())]
    at_once = f"{settings['concurrency']} at once"
    how = (
        f"each answer after {settings['latency']:g} s, {at_once}"
        if settings["latency"]
        else f"answers without delay, {at_once}"
    )
    lines.append(
        f"\nMedians of {settings['repeat']}, in turns, each with a fresh server, folder and journal. Four calls per "
        f"row (generate, verify, answer, judge) of a scripted server in a process of its own ({how}); seed "
        f"{settings['seed']}."
    )
    return "\n".join(lines)


def _format_speed(record: Mapping[str, Any]) -> list[str]:
    settings = record["settings"]
    lines = [
        "| | rows complete | first request to last answer, s (range) | times the ideal | requests/s | whole process, s "
        "| CPU, s | peak memory | most at once | turned away (429) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows, seconds in record["ideal_seconds"].items():
        label = f"the ideal: 4 x {int(rows):,} x {settings['latency']:g} s / {settings['concurrency']}"
        rate = f"{4 * int(rows) / seconds:,.0f}" if seconds else "–"
        lines.append(f"| {label} | {int(rows):,} | {seconds:.2f} | 1.000 | {rate} | – | – | – | – | – |")
    for line in record["medians"]:
        ratio = "–" if line["times_the_ideal"] is None else f"{line['times_the_ideal']:.3f}"
        cells = [
            NAMES[line["contender"]].format(**settings),
            f"{line['rows']:,.0f} of {line['rows_in']:,}",
            f"{line['seconds']:.2f} ({line['least_seconds']:.2f}-{line['most_seconds']:.2f})",
            ratio,
            f"{line['requests_per_second']:,.0f}",
            f"{line['process_seconds']:.2f}",
            f"{line['cpu_seconds']:.1f}",
            f"{line['peak_memory'] / 1e6:,.0f} MB",
            f"{line['most_at_once']:,.0f}",
            f"{line['too_many']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _format_memory(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "| rows | peak memory (range) | first request to last answer, s | requests/s | CPU, s |",
        "|---:|---:|---:|---:|---:|",
    ]
    medians = record["medians"]
    lines += [
        f"| {line['rows_in']:,} | {line['peak_memory'] / 1e6:,.1f} MB ({line['least_peak_memory'] / 1e6:,.1f}-"
        f"{line['most_peak_memory'] / 1e6:,.1f}) | {line['seconds']:.2f} | {line['requests_per_second']:,.0f} "
        f"| {line['cpu_seconds']:.1f} |"
        for line in medians
    ]
    if len(medians) > 1:
        first, last = (edge(medians, key=lambda line: line["rows_in"]) for edge in (min, max))
        grown = last["peak_memory"] - first["peak_memory"]
        lines += [
            "",
            f"- scripts/sysgen.py, peak memory from {first['rows_in']:,} to {last['rows_in']:,} rows: "
            f"{grown / 1e6:+,.1f} MB ({grown / first['peak_memory']:+.1%})",
        ]
    return lines
