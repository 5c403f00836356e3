"""Table of `benchmark.py train`: medians of the timed steps, ratios to TRL, and the accuracy of planned memory."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

_TOLERANCE = 0.1
"""Share of the measured peak within which planned memory counts as right."""
_BASELINES = {"full": "trl", "lora": "trl-lora"}
"""The contender that those of each method are compared with."""
_FACTORS = ("attention", "checkpointing", "liger", "compile", "optim")

Line = dict[str, Any]


def summarize(measurement: dict[str, Any], peak_flops: float | None) -> Line:
    """Return a contender's line: its settings, and medians of the timed steps or the reason why it failed.

    `peak_flops`: of the device; None if unknown, and then there is no MFU.
    """
    settings, used = measurement["settings"], measurement.get("used") or {}
    line: Line = {"contender": measurement["name"], "method": settings["method"]}
    for factor in _FACTORS:  # `auto` is no kernel, and TRL's defaults are known only from its run
        line[factor] = used.get(factor) if settings[factor] in (None, "auto") else settings[factor]
    line["attention"] = line["attention"] or settings["attention"]
    line["foretold"] = (measurement.get("foretold") or {}).get("total")
    if "reason" in measurement:
        return {**line, "reason": measurement["reason"]}
    steps = [step for step in measurement["steps"] if not step["warmup"]]

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(step) for step in steps)

    peak = (measurement.get("memory") or {}).get("peak_allocated")
    has_mfu = peak_flops and all(step["flops"] for step in steps)
    return {
        **line,
        "seconds": median(lambda step: step["seconds"]),
        "fastest": min(step["seconds"] for step in steps),
        "slowest": max(step["seconds"] for step in steps),
        "tokens_per_second": median(lambda step: step["tokens"] / step["seconds"]),
        "trained_tokens_per_second": median(lambda step: step["trained_tokens"] / step["seconds"]),
        "mfu": median(lambda step: step["flops"] / step["seconds"]) / peak_flops if has_mfu and peak_flops else None,
        "peak_allocated": peak,
        "foretold_error": line["foretold"] / peak - 1 if peak and line["foretold"] else None,
        "seconds_to_first_step": measurement["seconds_to_first_step"],
        "first_loss": measurement["steps"][0]["loss"],
        "last_loss": measurement["steps"][-1]["loss"],
    }


def speed_ratios(table: Sequence[Line]) -> dict[str, float]:
    """Return the tokens per second of each contender divided by those of TRL with the same method."""
    speeds = {line["contender"]: line["tokens_per_second"] for line in table if "reason" not in line}
    return {
        f"{line['contender']} / {baseline}": speeds[line["contender"]] / speeds[baseline]
        for line in table
        if (baseline := _BASELINES[line["method"]]) in speeds
        if line["contender"] in speeds and line["contender"] != baseline
    }


def format_line(line: Line) -> str:
    """Return a contender's line as text, for the progress bar."""
    if "reason" in line:
        return f"{line['contender']}: not measured: {line['reason']}"
    mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
    peak = "" if line["peak_allocated"] is None else f", {_gib(line['peak_allocated'])} GiB"
    if line["foretold_error"] is not None:
        peak += f" (planned {_gib(line['foretold'])}, {line['foretold_error']:+.0%})"
    return f"{line['contender']}: {line['seconds']:.3f} s/step, {line['tokens_per_second']:,.0f} tokens/s{mfu}{peak}"


def _gib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**30:.1f}"


def format_table(table: Sequence[Line], settings: dict[str, Any]) -> str:
    """Return the table, the reasons of failed contenders, the ratios to TRL and the accuracy of planned memory."""
    lines = [
        "| | attention | checkpointing | Liger | compile | optimizer | seconds/step (range) | tokens/s "
        "| trained tokens/s | MFU | peak GiB | planned GiB | first step | loss |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in table:
        cells = [line["contender"], *(line[factor] or "–" for factor in _FACTORS)]
        if "reason" in line:
            cells += ["not measured", *["–"] * 4, _gib(line["foretold"]), "–", "–"]
        else:
            cells += [
                f"{line['seconds']:.3f} ({line['fastest']:.3f}-{line['slowest']:.3f})",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['trained_tokens_per_second']:,.0f}",
                "–" if line["mfu"] is None else f"{line['mfu']:.1%}",
                _gib(line["peak_allocated"]),
                _gib(line["foretold"]),
                f"{line['seconds_to_first_step']:.0f} s",
                f"{line['first_loss']:.2f} -> {line['last_loss']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {line['contender']} was not measured: {line['reason']}" for line in table if "reason" in line]
    lines += _format_ratios(table)
    planned = [line for line in table if line.get("foretold_error") is not None]
    if planned:
        right = sum(abs(line["foretold_error"]) <= _TOLERANCE for line in planned)
        worst = max(planned, key=lambda line: abs(line["foretold_error"]))
        lines.append(
            f"- planned memory is within {_TOLERANCE:.0%} of the peak in {right} of {len(planned)} settings; the worst "
            f"is {worst['contender']}: {_gib(worst['foretold'])} GiB planned, {_gib(worst['peak_allocated'])} measured"
        )
    config = settings["config"]
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {settings['steps']} steps after {settings['warmup']}, each contender in a fresh process with "
            "empty caches. A step includes reading its rows, and ends when the device has finished its work. "
            f"{config['model_type']} of {config['num_hidden_layers']} layers, hidden size {config['hidden_size']:,}, "
            f"random weights; {settings['batch']} x {settings['max_length']:,} tokens per step of rows with Janus-like "
            f"lengths (random letters), packed by each trainer itself; seed {settings['seed']}. "
            "trl: TRL's defaults except max_length, packing, assistant_only_loss, batch size, seed and number of "
            "steps, without saving and tracking; bfloat16 weights (trl-float32: TRL's default) and the recipe's LoRA. "
            "full, lora: train/sft.py with recipes/janus-7b/sft, without evaluation, saving and tracking, with the "
            "changes in the name. MFU: by the convention of train/model/flops.py, against the peak of dense bfloat16. "
            "Peak GiB: allocated by PyTorch. Planned GiB: train/preflight/plan/plan.py, which counts selective "
            "checkpointing as none and leaves out Liger and compile.",
        ]
    )


def _format_ratios(table: Sequence[Line]) -> list[str]:
    """Return lines that compare the unchanged recipe and the fastest contender of each method with TRL."""
    ratios = speed_ratios(table)
    lines = []
    for method, baseline in _BASELINES.items():
        by_name = {
            line["contender"]: ratios[f"{line['contender']} / {baseline}"]
            for line in table
            if line["method"] == method and not line["contender"].startswith("trl")
            if f"{line['contender']} / {baseline}" in ratios
        }
        fastest = max(by_name, key=by_name.__getitem__, default=method)
        lines += [
            f"- {name}: {by_name[name]:.2f} times the tokens per second of {baseline}"
            for name in dict.fromkeys([method, fastest])
            if name in by_name
        ]
    return lines
