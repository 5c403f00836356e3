"""Sections of report.md by source and by label: losses, trained tokens and system gain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.formatting import shorten
from train.reporting.markdown import format_table
from train.storage.jsonl import read_json_lines
from train.system_gain.evaluator import FILE as GAIN_FILE
from train.system_gain.variants import SOURCE_LABEL

_MAX_LABELS = 12
_WIDTH = 60


def list_sources(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the sources that these lines of metrics.jsonl have a training loss of."""
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith("loss/"))
    return [key.removeprefix("loss/") for key in keys]


def read_gain_groups(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """Return the system gain of each group of rows at a step, from system_gain.jsonl."""
    path = output_dir / GAIN_FILE
    records = [line for line in (read_json_lines(path) if path.is_file() else []) if line["step"] == step]
    return records[-1]["groups"] if records else []


def source_section(
    metrics: Sequence[Mapping[str, Any]],
    evaluated: int | None,
    rows_by_source: Mapping[str, int],
    groups: Sequence[Mapping[str, Any]],
) -> str:
    """Return a table of the sources; empty for a run with a single one.

    Args:
        metrics: lines of metrics.jsonl.
        evaluated: step of the validation losses to show.
        rows_by_source: training rows of an epoch, by source.
        groups: system gain of each group of rows.
    """
    evaluation: Mapping[str, Any] = next(
        (line for line in reversed(metrics) if "eval_loss" in line and line["step"] == evaluated), {}
    )
    validated = [key.removeprefix("eval_loss/") for key in evaluation if key.startswith("eval_loss/")]
    names = dict.fromkeys([*(rows_by_source if len(rows_by_source) > 1 else ()), *list_sources(metrics), *validated])
    if not names:
        return ""
    gains = {group["is"]: group for group in groups if group["of"] == SOURCE_LABEL}
    lines = []
    for name in names:
        losses = [line[f"loss/{name}"] for line in metrics if f"loss/{name}" in line]
        tokens = sum(line.get(f"trained_tokens/{name}", 0) for line in metrics)
        lines.append(
            (
                shorten(name, _WIDTH),
                f"{rows_by_source[name]:,}" if name in rows_by_source else "",
                f"{tokens:,}" if losses else "",
                f"{format_loss(losses[0])} -> {format_loss(losses[-1])}" if losses else "",
                format_loss(evaluation[f"eval_loss/{name}"]) if name in validated else "",
                _format_gain(gains[name]) if name in gains else "",
            )
        )
    header = ("source", "rows", "trained tokens", "training loss", "validation loss", "system gain")
    note = "Rows of an epoch; trained tokens up to the last logged step; training loss, first and last logged."
    return f"## By source\n\n{format_table(header, lines)}\n\n{note}"


def label_section(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the system gain of the labels with most rows; empty without labels."""
    labelled = [group for group in groups if group["of"] != SOURCE_LABEL]
    largest = sorted(labelled, key=lambda group: -group["rows"])[:_MAX_LABELS]
    if not largest:
        return ""
    lines = [
        (shorten(f"{group['of']}: {group['is']}", _WIDTH), f"{group['rows']:,}", _format_gain(group))
        for group in largest
    ]
    rest = len(labelled) - len(largest)
    note = f"\n\n{rest} more with fewer rows are in {GAIN_FILE}." if rest else ""
    return f"## System gain by label\n\n{format_table(('label', 'rows', 'system gain'), lines)}{note}"


def format_loss(loss: float | str) -> str:
    """Return a loss with four decimals; one that is not finite is a string in metrics.jsonl already."""
    return f"{loss:.4f}" if isinstance(loss, float) else str(loss)


def _format_gain(group: Mapping[str, Any]) -> str:
    gain = group["gain"]
    interval = "" if gain.get("low") is None else f" [{gain['low']:.3f}, {gain['high']:.3f}]"
    return f"{gain['mean']:.3f}{interval}"
