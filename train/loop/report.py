"""Report of a run: report.md with its figures and samples, and plots of its metrics."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.formatting import duration, shorten
from train.loop.run_outcome import read_restarts
from train.loop.source_report import format_loss, label_section, list_sources, read_gain_groups, source_section
from train.recipe.measurements import SAMPLE_METRICS
from train.reporting.markdown import quote_line
from train.reporting.plots import escape_math, plot_metric, step_plot
from train.resampling import MIN_GROUPS
from train.samples.evaluator import FILE as SAMPLES_FILE
from train.samples.evaluator import describe_verdict
from train.storage.atomic_write import write_text
from train.storage.jsonl import read_json_lines
from train.system_gain.evaluator import FILE as GAIN_FILE

_MAX_PLOTTED_SOURCES = 6
_PREFERRED = "eval_rewards/accuracies"
_QUOTED = 4
"""Maximum number of samples of a kind in the report."""


def plot_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss over the steps, as a PNG of 1,000 x 500 pixels."""
    unit = "pair" if any("rewards/margins" in line for line in metrics) else "trained token"
    with step_plot(path, f"Loss of {_run_name(path)}", f"loss (nats per {unit})") as axes:
        plot_metric(axes, metrics, "loss", "training")
        plot_metric(axes, metrics, "eval_loss", "validation", markers=True)
        sources = list_sources(metrics)
        for source in sources if len(sources) <= _MAX_PLOTTED_SOURCES else ():
            plot_metric(axes, metrics, f"loss/{source}", escape_math(shorten(source, 40)), width=0.7)


def plot_system_gain(metrics: list[dict[str, Any]], path: Path) -> None:
    """Plot the system gain over the steps with its 95 % interval, as a PNG of 1,000 x 500 pixels."""
    with step_plot(path, f"System gain of {_run_name(path)}", "system gain (nats per token, 95 %)") as axes:
        plot_metric(axes, metrics, "eval_system_gain", "over other messages", markers=True)
        plot_metric(axes, metrics, "eval_system_gain_over_none", "over no message", markers=True)
        axes.axhline(0, color="black", linewidth=0.8)


def plot_followed(metrics: list[dict[str, Any]], path: Path) -> None:
    """Plot the shares of samples that follow the system message over the steps, as a PNG of 1,000 x 500 pixels."""
    with step_plot(path, f"Samples of {_run_name(path)}", "share of answers") as axes:
        for metric in SAMPLE_METRICS.values():
            plot_metric(axes, metrics, f"eval_{metric}", metric.replace("_", " "), markers=True)
        axes.set_ylim(0, 1)


def _run_name(path: Path) -> str:
    return shorten(path.resolve().parent.name, 60)


def write_report(output_dir: Path, screen: str, seconds: float, rows_by_source: Mapping[str, int]) -> bool:
    """Write report.md and its plots from metrics.jsonl. Return whether report.md was written.

    The model is saved by now, so that no error here may end the run.

    Args:
        output_dir: folder of the run.
        screen: the start screen.
        seconds: time of training.
        rows_by_source: training rows of an epoch, by source.
    """
    try:
        _write_report(output_dir, screen, seconds, rows_by_source)
    except Exception as error:  # of disks, fonts and matplotlib's settings
        print(f"warning: {output_dir / 'report.md'} couldn't be written: {error}. The model is complete.", flush=True)
        return False
    return True


def _write_report(output_dir: Path, screen: str, seconds: float, rows_by_source: Mapping[str, int]) -> None:
    metrics = read_json_lines(output_dir / "metrics.jsonl")
    plots = _try_plot(plot_loss, metrics, output_dir / "loss.png")
    losses = [line["loss"] for line in metrics if "loss" in line]
    validation = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    loaded = [line["loaded_step"] for line in metrics if line.get("loaded_step") in validation]
    speeds = sorted(line["tokens_per_second"] for line in metrics if "tokens_per_second" in line)
    restarts = read_restarts(output_dir)
    rows = [(f"training time since step {restarts[-1][0]}" if restarts else "training time", duration(seconds))]
    if restarts:
        listed = ", ".join(f"from step {step} ({ending})" for step, ending in restarts).replace("|", "\\|")
        rows.append(("restarts", f"{len(restarts)}: {listed}"))
    if losses:
        rows.append(("training loss, first and last logged", f"{format_loss(losses[0])} -> {format_loss(losses[-1])}"))
    evaluated = loaded[-1] if loaded else max(validation, default=None)
    if evaluated is not None:
        title = f"of the saved model (step {evaluated})" if loaded else "at the end"
        rows.append((f"validation loss {title}", format_loss(validation[evaluated])))
    preferred = {line["step"]: line[_PREFERRED] for line in metrics if _PREFERRED in line}
    if preferred:
        first, last = min(preferred), loaded[-1] if loaded else max(preferred)
        name = "pairs with the chosen answer preferred" + (f", after step {first} and {last}" * (first != last))
        rows.append((name, " -> ".join(f"{preferred[step]:.1%}" for step in dict.fromkeys((first, last)))))
    gains = _select_comparable(output_dir, {line["step"]: line for line in metrics if "eval_system_gain" in line})
    groups: list[dict[str, Any]] = []
    if gains:
        first, last = min(gains), loaded[-1] if loaded and loaded[-1] in gains else max(gains)
        name = "system gain in nats per token" + (f", after step {first} and {last}" if first != last else "")
        if "eval_system_gain_low" not in gains[last] and isinstance(gains[last]["eval_system_gain"], float):
            name += f" (fewer than {MIN_GROUPS} instructions: no interval)"
        shown = [_format_interval(gains[step], "eval_system_gain") for step in dict.fromkeys((first, last))]
        rows.append((name, " -> ".join(shown)))
        groups = read_gain_groups(output_dir, last)
        plots += _try_plot(plot_system_gain, list(gains.values()), output_dir / "system_gain.png")
    shares = {line["step"]: line for line in metrics if any(f"eval_{name}" in line for name in SAMPLE_METRICS.values())}
    if shares:
        first, last = min(shares), loaded[-1] if loaded and loaded[-1] in shares else max(shares)
        steps = dict.fromkeys((first, last))
        for name in SAMPLE_METRICS.values():
            if values := [f"{shares[step][f'eval_{name}']:.1%}" for step in steps if f"eval_{name}" in shares[step]]:
                label = f"samples: {name.replace('_', ' ')}" + (f", after step {first} and {last}" * (first != last))
                rows.append((label, " -> ".join(values)))
        plots += _try_plot(plot_followed, list(shares.values()), output_dir / "followed.png")
    if speeds:
        rows.append(("median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    tables = "".join(
        f"\n\n{section}"
        for section in (source_section(metrics, evaluated, rows_by_source, groups), label_section(groups))
        if section
    )
    write_text(
        output_dir / "report.md",
        f"# {output_dir.name}\n\n```\n{screen}\n```\n\n| | |\n|---|---|\n{table}{plots}{tables}\n"
        f"{_quote_samples(output_dir)}",
    )


def _quote_samples(output_dir: Path) -> str:
    """Return a section with some samples of the last evaluation; empty without samples."""
    path = output_dir / SAMPLES_FILE
    samples = read_json_lines(path) if path.is_file() else []
    if not samples:
        return ""
    step = max(sample["step"] for sample in samples)
    last = [sample for sample in samples if sample["step"] == step]
    lines = [f"\n## Samples of step {step}", "", f"{SAMPLES_FILE} has all {len(last):,} of this step."]
    for kind in dict.fromkeys(sample["kind"] for sample in last):
        of_kind = [sample for sample in last if sample["kind"] == kind and sample["answer"] is not None]
        lines += ["", f"**{kind}**", ""]
        for sample in of_kind[:: -(-len(of_kind) // _QUOTED) or 1]:
            (role, text), *others = ((turn["role"], str(turn["content"])) for turn in sample["messages"])
            lines += [f"- {role}: {quote_line(text)}", *(f"  - {of}: {quote_line(other)}" for of, other in others)]
            lines += [f"  - answer{describe_verdict(sample)}: {quote_line(sample['answer'])}"]
    return "\n".join(lines) + "\n"


def _try_plot(plot: Callable[[list[dict[str, Any]], Path], None], metrics: list[dict[str, Any]], path: Path) -> str:
    """Return the Markdown of a plot; nothing if it couldn't be drawn."""
    try:
        plot(metrics, path)
    except Exception as error:
        print(f"warning: {path} couldn't be drawn: {error}. metrics.jsonl holds its figures.", flush=True)
        return ""
    return f"\n\n![{path.stem.replace('_', ' ')}]({path.name})"


def _select_comparable(output_dir: Path, gains: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the gains measured on as many rows as the last: a resumed run may measure on others."""
    results = output_dir / GAIN_FILE
    rows = {line["step"]: line["overall"]["rows"] for line in read_json_lines(results)} if results.is_file() else {}
    return {step: line for step, line in gains.items() if rows.get(step) == rows.get(max(gains))}


def _format_interval(metrics: Mapping[str, Any], key: str) -> str:
    """Return a value with its interval: `0.757 [0.645, 0.866]`."""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    value = metrics[key]
    if not isinstance(value, float) or low is None or high is None:
        return format_loss(value)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
