"""What a run leaves to read: its resolved recipe, and report.md with the loss as a picture."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from train.formatting import duration, shorten
from train.loop.checkpoint.manifest import COMPLETE, folders
from train.loop.output_dir import CARD_MARK, is_card_of_others
from train.loop.run_outcome import restarts
from train.ranks import is_first_rank
from train.recipe import Recipe
from train.reporting.plots import load_pyplot
from train.resampling import MIN_GROUPS
from train.storage.atomic_write import write_text
from train.storage.jsonl import read_metrics
from train.system_gain.evaluator import FILE as GAIN_FILE

_FEW_POINTS = 30
"""A line through fewer of them has a mark at each."""


def write_model_card(recipe: Recipe, path: Path) -> None:
    """Write the model card, unless a README.md is there that no run wrote: a line then says so."""
    if is_card_of_others(path):
        print(f"{path} was not written by janus-sft and stays as it is: the model card is left out", flush=True)
        return
    path.write_text(model_card(recipe), encoding="utf-8")


def model_card(recipe: Recipe) -> str:
    """README.md of the finished model: what it was made from, and by which recipe."""
    base = recipe.model.name_or_path
    metadata = {
        "library_name": "transformers" if recipe.adapter is None else "peft",
        "tags": ["janus-sft", "sft"],
        **({} if Path(base).is_dir() else {"base_model": base}),
    }
    return (
        f"---\n{yaml.safe_dump(metadata)}---\n\n# {Path(recipe.output_dir).name}\n\n"
        f"`{base}`, {CARD_MARK}\n\n```yaml\n{recipe.to_yaml()}```\n"
    )


def draw_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss over the steps, as a PNG of 1,000 x 500 pixels."""
    with step_plot(path, "Loss", "loss (nats per trained token)") as axes:
        for key, name, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
            points = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), float)]
            if points:  # a line through one point can't be seen
                axes.plot(*zip(*points, strict=True), "o-" if len(points) < _FEW_POINTS else style, label=name)


def draw_gain(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw system gain over the steps with its 95 % interval, as a PNG of 1,000 x 500 pixels."""
    with step_plot(path, "System gain", "system gain (nats per token, 95 %)") as axes:
        for key, name in (
            ("eval_system_gain", "over other messages"),
            ("eval_system_gain_over_none", "over no message"),
        ):
            lines = [line for line in metrics if isinstance(line.get(key), float)]
            steps = [line["step"] for line in lines]
            axes.plot(steps, [line[key] for line in lines], "o-", label=name)
            if all(f"{key}_low" in line for line in lines):
                low, high = ([line[f"{key}_{end}"] for line in lines] for end in ("low", "high"))
                axes.fill_between(steps, low, high, alpha=0.2)
        axes.axhline(0, color="black", linewidth=0.8)


@contextmanager
def step_plot(path: Path, title: str, label: str) -> Iterator[Any]:
    """Yield axes over optimizer steps to draw on, and save them: whole steps, a legend below that covers nothing."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(10, 5), dpi=100, layout="constrained")
    yield axes
    axes.set_title(f"{title} of {shorten(path.resolve().parent.name, 60)}".replace("$", r"\$"))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    left, right = axes.dataLim.intervalx
    if left == right:
        axes.set_xlim(left - 1, right + 1)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def say_where_it_goes_on(output_dir: Path) -> None:
    """The last line of a run that was asked to stop: what the next one begins with."""
    if is_first_rank():
        newest = next((path for path in folders(output_dir) if (path / COMPLETE).is_file()), None)
        print(f"stopped; the same command {f'goes on from {newest}' if newest else 'starts anew'}", flush=True)


def write_report(output_dir: Path, screen: str, seconds: float) -> bool:
    """Write report.md and loss.png from metrics.jsonl, the screen shown before training and the time it took.

    Returns whether report.md is there. The model is saved by now, so that nothing here may end the run in an error.
    """
    try:
        _write_report(output_dir, screen, seconds)
    except Exception as error:  # of disks, fonts and matplotlib's settings
        print(f"warning: {output_dir / 'report.md'} couldn't be written: {error}. The model is complete.", flush=True)
        return False
    return True


def _write_report(output_dir: Path, screen: str, seconds: float) -> None:
    metrics = read_metrics(output_dir / "metrics.jsonl")
    loss = _picture(draw_loss, metrics, output_dir / "loss.png")
    losses = [line["loss"] for line in metrics if "loss" in line]
    validation = {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line}
    loaded = [line["loaded_step"] for line in metrics if line.get("loaded_step") in validation]
    speeds = sorted(line["tokens_per_second"] for line in metrics if "tokens_per_second" in line)
    again = restarts(output_dir)
    rows = [(f"training time since step {again[-1][0]}" if again else "training time", duration(seconds))]
    if again:
        told = ", ".join(f"from step {step} ({ended})" for step, ended in again).replace("|", "\\|")
        rows.append(("restarts", f"{len(again)}: {told}"))
    if losses:
        rows.append(("training loss, first and last logged", f"{_short(losses[0])} -> {_short(losses[-1])}"))
    if loaded:
        rows.append((f"validation loss of the saved model (step {loaded[-1]})", _short(validation[loaded[-1]])))
    elif validation:
        rows.append(("validation loss at the end", _short(validation[max(validation)])))
    gains = _comparable(output_dir, {line["step"]: line for line in metrics if "eval_system_gain" in line})
    picture = ""
    if gains:
        first, last = min(gains), loaded[-1] if loaded and loaded[-1] in gains else max(gains)
        name = "system gain in nats per token" + (f", after step {first} and {last}" if first != last else "")
        if "eval_system_gain_low" not in gains[last] and isinstance(gains[last]["eval_system_gain"], float):
            name += f" (of fewer than {MIN_GROUPS} instructions: no interval)"
        shown = [_with_interval(gains[step], "eval_system_gain") for step in dict.fromkeys((first, last))]
        rows.append((name, " -> ".join(shown)))
        picture = _picture(draw_gain, list(gains.values()), output_dir / "system_gain.png")
    if speeds:
        rows.append(("median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    write_text(
        output_dir / "report.md",
        f"# {output_dir.name}\n\n```\n{screen}\n```\n\n| | |\n|---|---|\n{table}{loss}{picture}\n",
    )


def _picture(draw: Callable[[list[dict[str, Any]], Path], None], metrics: list[dict[str, Any]], path: Path) -> str:
    """Draw a picture; how report.md shows it: not at all where that failed."""
    try:
        draw(metrics, path)
    except Exception as error:
        print(f"warning: {path} couldn't be drawn: {error}. metrics.jsonl holds its figures.", flush=True)
        return ""
    return f"\n\n![{path.stem.replace('_', ' ')}]({path.name})"


def _comparable(output_dir: Path, gains: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Those measured on as many rows as the last: a run may be gone on with, and others be asked for."""
    kept = output_dir / GAIN_FILE
    rows = {line["step"]: line["overall"]["rows"] for line in read_metrics(kept)} if kept.is_file() else {}
    return {step: line for step, line in gains.items() if rows.get(step) == rows.get(max(gains))}


def _with_interval(metrics: Mapping[str, Any], key: str) -> str:
    """`0.757 [0.645, 0.866]`."""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    value = metrics[key]
    if not isinstance(value, float) or low is None or high is None:
        return _short(value)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _short(loss: float | str) -> str:
    """Four decimals; a loss that is not finite is a string in metrics.jsonl, and stays as it is."""
    return f"{loss:.4f}" if isinstance(loss, float) else str(loss)
