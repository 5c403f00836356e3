"""The table of `benchmark.py train`, and what follows from it."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

_GIB = 2**30
_CLOSE = 0.1
"""How far the plan's memory may be from the peak, as a share of it."""
_COMPARED = {"full": "trl", "lora": "trl-lora"}
"""What ours of each method is compared with."""
_FACTORS = ("attention", "checkpointing", "liger", "compile", "optim")


def line_of(measured: dict[str, Any], peak_flops: float | None) -> dict[str, Any]:
    """What the table has of one contender: medians of the timed steps. Of one that failed: its settings and why.

    `peak_flops`: of the device, None = unknown, and then there is no share of it.
    """
    settings, memory = measured["settings"], measured.get("memory") or {}
    used = measured.get("used") or {}
    line: dict[str, Any] = {"contender": measured["name"], "method": settings["method"]}
    for factor in _FACTORS:  # auto is no kernel, and TRL's defaults are known only by what it uses
        wanted = settings[factor]
        line[factor] = used.get(factor) if wanted in (None, "auto") else wanted
    line["attention"] = line["attention"] or settings["attention"]
    line["foretold"] = (measured.get("foretold") or {}).get("total")
    if "reason" in measured:
        return {**line, "reason": measured["reason"]}
    steps = [step for step in measured["steps"] if not step["warmup"]]

    def median(of_step: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(of_step(step) for step in steps)

    peak = memory.get("peak_allocated")
    return {
        **line,
        "seconds": median(lambda step: step["seconds"]),
        "fastest": min(step["seconds"] for step in steps),
        "slowest": max(step["seconds"] for step in steps),
        "tokens_per_second": median(lambda step: step["tokens"] / step["seconds"]),
        "trained_tokens_per_second": median(lambda step: step["trained_tokens"] / step["seconds"]),
        "mfu": peak_flops and median(lambda step: step["flops"] / step["seconds"]) / peak_flops,
        "peak_allocated": peak,
        "peak_reserved": memory.get("peak_reserved"),
        "foretold_error": line["foretold"] / peak - 1 if peak and line["foretold"] else None,
        "seconds_to_first_step": measured["seconds_to_first_step"],
        "first_loss": measured["steps"][0]["loss"],
        "last_loss": measured["steps"][-1]["loss"],
    }


def ratios(table: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast the first is as the second, in tokens a second: each of ours beside TRL."""
    speeds = {line["contender"]: line["tokens_per_second"] for line in table if "reason" not in line}
    return {
        f"{line['contender']} / {other}": speeds[line["contender"]] / speeds[other]
        for line in table
        if (other := _COMPARED[line["method"]]) in speeds and line["contender"] in speeds and line["contender"] != other
    }


def shown(line: dict[str, Any]) -> str:
    """A contender in one line of text."""
    if "reason" in line:
        return f"{line['contender']}: not measured: {line['reason']}"
    mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
    peak = "" if line["peak_allocated"] is None else f", {_gib(line['peak_allocated'])} GiB{_foretold(line)}"
    return f"{line['contender']}: {line['seconds']:.3f} s a step, {line['tokens_per_second']:,.0f} tokens/s{mfu}{peak}"


def _gib(count: int | None) -> str:
    return "–" if count is None else f"{count / _GIB:.1f}"


def _foretold(line: dict[str, Any]) -> str:
    error = line["foretold_error"]
    return "" if error is None else f" (foretold {_gib(line['foretold'])}, {error:+.0%})"


def markdown(table: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The table, what could not be measured and why, who is how much faster, and how right the plan was."""
    lines = [
        "| | attention | checkpointing | Liger | compile | optimizer | seconds a step (range) | tokens/s "
        "| trained tokens/s | MFU | peak GiB | reserved GiB | plan GiB | first step | loss |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in table:
        cells = [line["contender"], *(line[factor] or "–" for factor in _FACTORS)]
        if "reason" in line:
            cells += ["not measured", *["–"] * 5, _gib(line["foretold"]), "–", "–"]
        else:
            cells += [
                f"{line['seconds']:.3f} ({line['fastest']:.3f}-{line['slowest']:.3f})",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['trained_tokens_per_second']:,.0f}",
                "–" if line["mfu"] is None else f"{line['mfu']:.1%}",
                _gib(line["peak_allocated"]),
                _gib(line["peak_reserved"]),
                _gib(line["foretold"]),
                f"{line['seconds_to_first_step']:.0f} s",
                f"{line['first_loss']:.2f} -> {line['last_loss']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {line['contender']} was not measured: {line['reason']}" for line in table if "reason" in line]
    lines += _compared(table)
    known = [line for line in table if line.get("foretold_error") is not None]
    if known:
        close = sum(abs(line["foretold_error"]) <= _CLOSE for line in known)
        worst = max(known, key=lambda line: abs(line["foretold_error"]))
        lines.append(
            f"- the plan's memory is within {_CLOSE:.0%} of the peak in {close} of {len(known)} settings, furthest off "
            f"in {worst['contender']}: {_gib(worst['foretold'])} GiB foretold, {_gib(worst['peak_allocated'])} measured"
        )
    return "\n".join([*lines, "", _settings(settings)])


def _compared(table: Sequence[dict[str, Any]]) -> list[str]:
    """For each method the recipe as it is, and the fastest, beside TRL."""
    found = ratios(table)
    lines = []
    for method, other in _COMPARED.items():
        of_method = {
            line["contender"]: found[f"{line['contender']} / {other}"]
            for line in table
            if line["method"] == method and not line["contender"].startswith("trl") and "reason" not in line
            if f"{line['contender']} / {other}" in found
        }
        fastest = max(of_method, key=of_method.__getitem__, default=method)
        lines += [
            f"- {name}: {of_method[name]:.2f} times as many tokens a second as {other}"
            for name in dict.fromkeys([method, fastest])
            if name in of_method
        ]
    return lines


def _settings(settings: dict[str, Any]) -> str:
    """How it was measured, in words."""
    config = settings["config"]
    return " ".join(
        [
            f"Medians of {settings['steps']} steps after {settings['warmup']}, each contender in a fresh process with",
            "empty caches; a step ends when all work on the device is done, and reading the rows is part of it.",
            f"{config['model_type']} of {config['num_hidden_layers']} layers, hidden size {config['hidden_size']:,},",
            f"random weights; {settings['batch']} x {settings['max_length']:,} tokens a step of rows with Janus-like",
            f"lengths (random ids), packed by each trainer itself; seed {settings['seed']}.",
            "trl: TRL's defaults but for max_length, packing, batch size, seed and number of steps, without saving and",
            "tracking; bfloat16 weights like ours (trl-float32: as TRL loads them) and the recipe's LoRA.",
            "full, lora: recipes/janus-7b/sft with that batch, without evaluation, saving and tracking, and with",
            "the changes in the name.",
            "MFU: by the convention of train/model/flops.py, of the documents that were trained, against the peak of",
            "dense bfloat16. Peak GiB: allocated by PyTorch while training. Plan GiB: foretold by train/preflight/plan/plan.py, which",
            "counts selective checkpointing as none and knows nothing of Liger and compile.",
        ]
    )
