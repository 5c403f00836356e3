"""Measure saves: the seconds that training stands still for a checkpoint, and the seconds until it is complete.

    python scripts/benchmark.py saves --json saves.json
    python scripts/benchmark.py saves --disk /mnt/checkpoints --config model/config.json --steps-between 50

A model with random weights is trained in full by one process, as train/finetune.py does it, and saves checkpoints with
AdamW's states. A checkpoint is complete when its folder has its name: all of its files are on the disk then, and their
checksums in its manifest. The first save, for which memory and disk are not warm, is not counted.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from threading import Event, Thread
from typing import Any

from benchmarks.record import check_json_file, describe_environment, publish
from train.cli import non_negative_int, positive_int
from train.errors import UserError

_COLUMNS = {"stall": "stall", "weights": "of it weights", "optimizer": "of it optimizer", "complete": "complete"}
"""Times of a save by their keys, and their titles in the table."""
_PACKAGES = ("janus-sft", "torch", "transformers", "safetensors", "xxhash")
_WARMUP = 1
_POLL_SECONDS = 0.002
_ROWS = 2_000
_BUFFER = 1 << 28
"""Bytes; more than the caches of a CPU hold."""

Save = dict[str, float]
"""Step, bytes, and the seconds of each part."""


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    about = "how long training stands still for a checkpoint"
    parser = commands.add_parser("saves", help=about, description=__doc__)
    add = parser.add_argument
    add("--saves", type=positive_int, default=5, help="checkpoints; the table has medians (default %(default)s)")
    about_steps = "optimizer steps from one save to the next (default %(default)s)"
    add("--steps-between", type=positive_int, default=10, metavar="N", help=about_steps)
    add("--max-length", type=positive_int, default=512, help="tokens of the one sequence of a step (default 512)")
    add("--config", default="mistral-74m", metavar="FILE_OR_NAME", help="a model's config.json (default %(default)s)")
    add(
        "--disk",
        type=Path,
        default=Path(gettempdir()),
        metavar="FOLDER",
        help="folder to save in (default %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    add("--seed", type=non_negative_int, default=42, help="decides rows and weights (default 42)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the saves, print the table and write the record. Raises UserError."""
    check_json_file(options.json)
    if not options.disk.is_dir():
        raise UserError(f"--disk {options.disk}: there is no such folder")
    settings = {key: getattr(options, key) for key in ("saves", "steps_between", "max_length", "config", "seed")}
    environment = describe_environment(_PACKAGES)
    with TemporaryDirectory(prefix="janus-benchmark-", dir=options.disk) as name:
        record = {"settings": settings, **measure(Path(name), settings)}
    publish(format_table(record), environment, {"command": "saves", **record}, options.json)


class SaveClock:
    """Clock of saves: their parts, and the moment at which the folder of each has its name."""

    def __init__(self, output_dir: Path) -> None:
        self.saves: list[Save] = []
        self._output_dir, self._ended, self._watches = output_dir, Event(), list[Thread]()

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Time the block in which training stands still, and watch for the checkpoint from its beginning."""
        save: Save = {"step": step}
        self.saves.append(save)
        began = time.perf_counter()
        self._watches.append(Thread(target=self._watch, args=(save, began)))
        self._watches[-1].start()
        yield
        save["stall"] = time.perf_counter() - began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the save."""
        began = time.perf_counter()
        yield
        self.saves[-1][name] = time.perf_counter() - began

    def close(self) -> None:
        """End the watches."""
        self._ended.set()
        for watch in self._watches:
            watch.join()

    def _watch(self, save: Save, began: float) -> None:
        folder = self._output_dir / f"checkpoint-{save['step']}"
        while not folder.exists():
            if self._ended.wait(_POLL_SECONDS):
                return
        save["complete"] = time.perf_counter() - began
        save["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_bytes(file: Path, count: int) -> Save:
    """Write as many bytes as a checkpoint has, and sync them: the least that a save of them takes."""
    buffer = memoryview(bytes(_BUFFER))
    began = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for start in range(0, count, _BUFFER):
            stream.write(buffer[: count - start])
        stall = time.perf_counter() - began
        os.fsync(stream.fileno())
    complete = time.perf_counter() - began
    file.unlink()
    return {"stall": stall, "complete": complete}


def measure(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and save. Return the saves that count, writes of as many bytes, and the seconds of each step."""
    from torch import nn
    from transformers import AutoConfig

    from benchmarks.training_inputs import load_workload, write_rows, write_tokenizer
    from benchmarks.training_settings import RECIPES
    from benchmarks.training_steps import StepClock, Steps, TimedJanus, build_trainer
    from train.recipe import load_recipe

    steps = (settings["saves"] + _WARMUP) * settings["steps_between"]
    workload = load_workload(settings["config"], _ROWS, settings["max_length"], 0, steps, settings["seed"])
    write_rows(workload, folder / "rows.jsonl")
    write_tokenizer(folder / "model")
    overrides = {
        "model.name_or_path": str(folder / "model"),
        "model.dtype": "float32",
        "data.sources": [{"path": str(folder / "rows.jsonl")}],
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": settings["max_length"],
        "data.validation": None,
        "training.bf16": False,
        "training.gradient_accumulation_steps": 1,
        "training.optim": "adamw_torch",
        "training.max_steps": steps,
        "training.eval_strategy": "no",
        "training.save_steps": settings["steps_between"],
        "training.save_total_limit": 1,
        "tracking.wandb": None,
        "output_dir": str(folder / "run"),
        "seed": settings["seed"],
    }
    recipe = load_recipe(RECIPES["full"], [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    clock = SaveClock(folder / "run")

    class Timed(TimedJanus):
        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
            with clock.saving(self.state.global_step):
                super()._save_checkpoint(model, trial)

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            with clock.part("weights"):
                super().save_model(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            with clock.part("optimizer"):
                super()._save_optimizer_and_scheduler(output_dir)

    times = Steps()
    trainer = build_trainer(recipe, AutoConfig.for_model(**workload.config), [StepClock(times)], Timed)
    trainer.steps = times
    trainer.train()
    clock.close()
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    saves = clock.saves[_WARMUP:]
    bare = [write_bytes(folder / "bytes", int(save["bytes"])) for save in saves]
    return {"saves": saves, "bare": bare, "step_seconds": times.seconds(), "parameters": parameters}


def format_table(record: dict[str, Any]) -> str:
    """Return the table of medians and the workload."""
    saves, settings = record["saves"], record["settings"]

    def row(name: str, measurements: list[Save]) -> str:
        cells = []
        for key in _COLUMNS:
            values = [save[key] for save in measurements if key in save]
            seconds = f"{statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})" if values else "-"
            cells.append(seconds)
        ratio = statistics.median(save["stall"] / save["complete"] for save in measurements)
        return f"| {' | '.join([name, *cells])} | {ratio:.2f} |"

    step = statistics.median(record["step_seconds"])
    return "\n".join(
        [
            f"| | {' | '.join(_COLUMNS.values())} | stall / complete |",
            f"|---|{'---:|' * (len(_COLUMNS) + 1)}",
            row("janus-sft", saves),
            row("the same bytes, by write() and fsync()", record["bare"]),
            "",
            f"Checkpoints of {saves[0]['bytes'] / 1e9:.2f} GB. Medians of {len(saves)} (range); a save before them is "
            f"not counted. {record['parameters']:,} parameters in float32, AdamW, {settings['steps_between']} steps of "
            f"{settings['max_length']} tokens from one save to the next (median {step:.2f} s).",
        ]
    )
