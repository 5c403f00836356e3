"""Figures by source in report.md, loss.png and the trackers."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from train.loop.report import plot_loss
from train.loop.source_report import label_section
from train.sft import main


def write_source(path: Path, rows: range, word: str) -> dict[str, str]:
    """Write rows of two labels; siblings have the same question."""
    with path.open("w", encoding="utf-8") as lines:
        for row in rows:
            turns = [
                ("system", f"{word} {row}"),
                ("user", f"question {row // 2}"),
                ("assistant", f"{word} " * (row + 1)),
            ]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages, "rule": f"r{row % 2}"}) + "\n")
    return {"path": str(path)}


@pytest.fixture
def run(recipe_file: Callable[..., Path], tmp_path: Path) -> Path:
    """Train on two sources with validation sources of the same names, with trackers."""
    folders = [tmp_path / name for name in ("training", "validation")]
    for folder in folders:
        folder.mkdir()
    sources, validation = (
        [
            write_source(folder / "river.jsonl", range(12), f"river {folder.name}"),
            write_source(folder / "stone.jsonl", range(7), f"stone {folder.name}"),
        ]
        for folder in folders
    )
    training = {"num_train_epochs": ..., "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    tracking = {"tensorboard": True, "wandb": {"project": "test", "mode": "offline"}}
    recipe = recipe_file(data={"sources": sources, "validation": validation}, training=training, tracking=tracking)
    assert main(["--recipe", str(recipe)]) == 0
    return tmp_path / "run"


def test_report_and_trackers_show_the_figures_of_metrics_jsonl(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, evaluations = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    last = evaluations[-1]
    for name in ("eval_loss", "eval_system_gain"):
        assert [key for key in last if key.startswith(f"{name}/")] == [f"{name}/river", f"{name}/stone"]

    report = (run / "report.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (run / "system_gain.jsonl").read_text(encoding="utf-8").splitlines()]
    groups = {(group["of"], group["is"]): group for group in records[-1]["groups"]}
    assert {*groups} == {("data", "river"), ("data", "stone"), ("rule", "r0"), ("rule", "r1")}
    cells = {key: format_gain(group["gain"]) for key, group in groups.items()}
    for name, rows in (("river", 12), ("stone", 7)):
        assert groups["data", name]["gain"]["mean"] == last[f"eval_system_gain/{name}"]
        tokens = sum(line.get(f"trained_tokens/{name}", 0) for line in steps)
        losses = [f"{line[f'loss/{name}']:.4f}" for line in steps if f"loss/{name}" in line]
        validation = f"{last[f'eval_loss/{name}']:.4f}"
        assert (
            f"\n| {name} | {rows} | {tokens:,} | {losses[0]} -> {losses[-1]} | {validation} | {cells['data', name]} |\n"
            in report
        )
    for name in ("r0", "r1"):
        assert f"\n| rule: {name} | {groups['rule', name]['rows']} | {cells['rule', name]} |\n" in report

    # Trackers.
    expected = {
        f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value
        for line in lines
        for key, value in line.items()
        if "/" in key
    }
    assert read_tensorboard(run) == pytest.approx(expected, rel=1e-6)
    assert read_wandb(run) == pytest.approx(expected)


def format_gain(gain: dict[str, Any]) -> str:
    interval = "" if gain["low"] is None else f" [{gain['low']:.3f}, {gain['high']:.3f}]"
    return f"{gain['mean']:.3f}{interval}"


def read_tensorboard(run: Path) -> dict[str, float]:
    """Return the last value of each figure by source in TensorBoard's folder."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.count("/") == 2}


def read_wandb(run: Path) -> dict[str, float]:
    """Return the last value of each figure by source in the file of wandb's offline run."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    [path] = (run / "wandb").glob("offline-run-*/*.wandb")
    values: dict[str, float] = {}
    for record in read_records(path.read_bytes()):
        for item in messages.Record.FromString(record).history.item:
            key = item.key or "/".join(item.nested_key)
            if key.count("/") == 2:
                values[key] = json.loads(item.value_json)
    return values


def read_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB with parts of records, behind a header."""
    position, record = 7, b""
    while position + 7 <= len(log):
        if (room := -position % 2**15) < 7:
            position += room
        length, kind = struct.unpack_from("<HB", log, position + 4)  # after the checksum
        position += 7
        record += log[position : position + length]
        position += length
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


def test_at_most_six_sources_are_plotted(tmp_path: Path) -> None:
    def picture(sources: int) -> bytes:
        figures = {f"loss/source {number}": 2.0 + number for number in range(sources)}
        plot_loss([{"step": step, "loss": 2.0, **figures} for step in (1, 2)], tmp_path / "loss.png")
        return (tmp_path / "loss.png").read_bytes()

    assert picture(7) == picture(0)
    assert picture(6) != picture(0)


def test_the_labels_with_most_rows_are_listed() -> None:
    gain = {"mean": 0.5, "low": None, "high": None}
    groups = [{"of": "rule", "is": f"r{rows}", "rows": rows, "gain": gain} for rows in range(1, 21)]
    section = label_section([*groups, {"of": "data", "is": "river", "rows": 99, "gain": gain}])
    listed = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| rule")]
    assert listed == [f"| rule: r{rows}" for rows in range(20, 8, -1)]
    assert "8 more with fewer rows are in system_gain.jsonl" in section
    assert label_section(groups[:0]) == ""
