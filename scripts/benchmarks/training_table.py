"""Lines, table and comparisons of `benchmark.py train`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_settings import parse_setting
from train.errors import UserError

BASELINES = Path(__file__).parent / "baselines"
"""Records of earlier runs, one per kind of GPU."""
_SAME = ("layers", "optimizer", "recipe")
"""Keys of a line that must be those of an earlier one."""
_TOLERANCE = 0.03
"""Share of the measured peak within which planned memory counts as right."""

Line = dict[str, Any]


def baseline_file(gpu: str) -> Path:
    """Return the file of a kind of GPU: `NVIDIA H200` -> nvidia-h200.json."""
    return BASELINES / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def read_baseline(file: Path, workload: Mapping[str, Any]) -> dict[str, Line]:
    """Return the steps of an earlier record by name; none if there is no file, or it had another workload.

    Raises UserError if the file holds something else.
    """
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text("utf-8"))
        if record["workload"] != dict(workload):
            return {}
        return {line["name"]: line for line in record["measurements"] if line.get("tokens_per_second")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no record of `benchmark.py train` ({type(error).__name__}: {error})") from error


def ratios(lines: Sequence[Line], baseline: Mapping[str, Line]) -> dict[str, dict[str, float]]:
    """Return the tokens per second of each setting divided by those of TRL (`trl`), and of `baseline` (`earlier`).

    Only lines of the same layers, optimizer and recipe are compared: a name says what differs from the recipe.
    """
    steps = {line["name"]: line for line in lines if "tokens_per_second" in line}
    speeds = {name: line["tokens_per_second"] for name, line in steps.items()}
    quotients: dict[str, dict[str, float]] = {}
    for name, speed in speeds.items():
        setting, quotients[name] = parse_setting(name), {}
        if setting and not setting.trl and setting.baseline in speeds:
            quotients[name]["trl"] = speed / speeds[setting.baseline]
        before = baseline.get(name)
        if before and all(before.get(key) == steps[name].get(key) for key in _SAME):
            quotients[name]["earlier"] = speed / before["tokens_per_second"]
    return quotients


def format_line(line: Line, machine: Line, ratio: Mapping[str, float]) -> str:
    """Return a measurement as a line of text. `machine`: the line of that name."""
    name = line["name"]
    if "skipped" in line:
        return f"{name}: skipped: {line['skipped']}"
    if "reason" in line:
        return f"{name}: not measured: {line['reason']}"
    if name == "machine":
        return f"machine: {_format_machine(line)}"
    if name == "bandwidth":
        return f"bandwidth: {line['bytes_per_second'] / 1e12:.2f} TB/s for a copy within the device"
    if name == "profile":
        return "\n".join([f"profile of {line['setting']}: {_format_profile(line)}", *_format_kernels(line)])
    speed = f"{line['flops_per_second'] / 1e12:,.3g} TFLOP/s"
    share = f", {line['flops_per_second'] / machine['peak_flops']:.1%}" if machine["peak_flops"] else ""
    if name == "matmul":
        return f"matmul: {speed}{share and share + ' of the data sheet'}"
    if name.startswith("attention "):
        return f"{name}: {line['seconds'] * 1e3:.2f} ms forward and backward, {line['tokens']:,} tokens, {speed}"
    memory = ""
    if line.get("peak_bytes"):
        memory = f", {_gib(line['peak_bytes'])} GiB"
        if line["planned_bytes"]:
            memory += f" (planned {_gib(line['planned_bytes'])}, {line['planned_bytes'] / line['peak_bytes'] - 1:+.1%})"
    against = "".join(f", {value:.2f} x {'TRL' if key == 'trl' else key}" for key, value in ratio.items())
    return (
        f"{name}: {line['seconds']:.3f} s/step, {line['tokens_per_second']:,.0f} tokens/s"
        f"{share and ', MFU' + share[1:]}{memory}, start {line['start_seconds']:.0f} s{against}"
    )


def _format_machine(line: Line) -> str:
    size = "" if line["memory_bytes"] is None else f", {line['memory_bytes'] / 2**30:.0f} GiB"
    peak = "unknown, so no MFU" if line["peak_flops"] is None else f"{line['peak_flops'] / 1e12:,.0f} TFLOP/s"
    driver = f", driver {line['driver']}" if line.get("driver") else ""
    return f"{line['device']}{size}, peak {peak}{driver}; {line['layers']} of {line['of_layers']} layers fit"


def _format_profile(line: Line) -> str:
    return f"{line['seconds']:.3f} s, idle {line['idle_share']:.1%}; {line['trace']}"


def _format_kernels(line: Line) -> list[str]:
    return [
        f"  {kernel['seconds'] / line['seconds']:6.1%} {kernel['calls']:6,} x {kernel['kernel'][:90]}"
        for kernel in line["kernels"]
    ]


def _gib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**30:.1f}"


def format_table(lines: Sequence[Line], quotients: Mapping[str, Mapping[str, float]]) -> str:
    """Return the measured settings as a table in Markdown, and the accuracy of planned memory."""
    machine = next(line for line in lines if line["name"] == "machine")
    rows = [
        "| | attention | s/step (range) | tokens/s | MFU | peak GiB | planned | start | loss | x TRL | x earlier |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    steps = [line for line in lines if "tokens_per_second" in line]
    for line in steps:
        ratio = quotients.get(line["name"], {})
        cells = [
            line["name"],
            line["attention"],
            f"{line['seconds']:.3f} ({line['fastest']:.3f}-{line['slowest']:.3f})",
            f"{line['tokens_per_second']:,.0f}",
            f"{line['flops_per_second'] / machine['peak_flops']:.1%}" if machine["peak_flops"] else "–",
            _gib(line.get("peak_bytes")),
            _gib(line["planned_bytes"]),
            f"{line['start_seconds']:.0f} s",
            f"{line['first_loss']:.2f} -> {line['last_loss']:.2f}",
            *(f"{ratio[key]:.2f}" if key in ratio else "–" for key in ("trl", "earlier")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    planned = [
        (line["planned_bytes"] / line["peak_bytes"] - 1, line["name"])
        for line in steps
        if line.get("peak_bytes") and line["planned_bytes"]
    ]
    if planned:
        right = sum(abs(error) <= _TOLERANCE for error, _ in planned)
        error, name = max(planned, key=lambda each: abs(each[0]))
        within = f"within {_TOLERANCE:.0%} of the peak in {right} of {len(planned)} settings"
        rows.append(f"\nPlanned memory is {within}; the worst is {name}: {error:+.1%}.")
    return "\n".join(rows)


def best_settings(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Return the fastest setting of each group, with the overrides of the recipe that select it."""
    best: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: -line.get("tokens_per_second", 0)):
        setting = parse_setting(line["name"])
        if setting and not setting.trl and "tokens_per_second" in line and setting.group not in best:
            best[setting.group] = {
                "name": setting.name,
                "recipe": f"recipes/janus-7b/sft/{setting.method}.yaml",
                "overrides": line["overrides"],
                "optimizer": line["optimizer"],
                "recipe_optimizer": setting.load_recipe([]).training["optim"],
                "tokens_per_second": line["tokens_per_second"],
            }
    return best
