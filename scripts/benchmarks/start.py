"""Measure the start of a run by its number of rows: seconds and memory of --check, of the first step and of a resume.

    python scripts/benchmark.py start --rows 10000 200000 --json start.json --plot start.png

Each line is the complete command of a user, from its first import to its end, in a process of its own: `--check` with
an empty cache and with a filled one, one optimizer step of a tiny model, and one more after a resume. The imports alone
are the same for all numbers of rows.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.process import failure_reason, running, script_command
from benchmarks.record import check_json_file, describe_environment, publish
from train.cli import positive_int
from train.errors import UserError
from train.progress import progress_bar
from train.reporting.markdown import format_table
from train.reporting.plots import new_figure

_PACKAGES = ("janus-sft", "torch", "transformers", "trl", "accelerate", "datasets", "peft")
IMPORTS = "imports"
_IMPORT = """
from train.cli import exit_with, heavy_imports
with heavy_imports():
    import train.finetune
exit_with(lambda: 0)
"""
PHASES = {
    "--check, cold": ("--check",),
    "--check, warm": ("--check",),
    "one step": ("training.max_steps=1",),
    "resumed, one step": ("--resume-anyway=training.max_steps", "training.max_steps=2"),
}
"""Measured command -> its arguments beside the recipe; they run in this order on the same cache and output_dir."""
_TEXT = "the model reads what its system message says before it answers a question about rivers or numbers"

Figures = dict[str, Any]


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser("start", help="start of a run by its number of rows", description=__doc__)
    add = parser.add_argument
    add("--rows", type=positive_int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of rows")
    add("--repeat", type=positive_int, default=3, help="runs of each; the table has medians (default 3)")
    add("--json", type=Path, metavar="FILE", help="write every measurement to FILE")
    add("--plot", type=Path, metavar="PNG", help="draw seconds and memory by rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, draw the plot and write the record. Raises UserError."""
    from benchmarks.training_inputs import load_model_config, write_model

    check_json_file(options.json)
    environment = describe_environment(_PACKAGES)
    sizes = sorted(set(options.rows))
    measurements: list[Figures] = []
    with (
        TemporaryDirectory(prefix="janus-benchmark-") as name,
        progress_bar("measuring", total=options.repeat * (1 + len(sizes) * len(PHASES)), unit="commands") as measuring,
    ):
        folder = Path(name)
        write_model(folder / "model", load_model_config("tiny"), seed=0)
        for repetition in range(options.repeat):
            measurements.append({"phase": IMPORTS, "rows": 0, **measure([sys.executable, "-c", _IMPORT], folder)})
            measuring.advance()
            for rows in sizes:
                recipe = write_inputs(folder / f"{rows}-{repetition}", folder / "model", rows)
                for phase, arguments in PHASES.items():
                    command = [sys.executable, "-m", "train.sft", "--recipe", str(recipe), *arguments]
                    measurements.append({"phase": phase, "rows": rows, **measure(command, folder)})
                    measuring.advance()
    medians = compute_medians(measurements)
    if options.plot:
        draw(medians, options.plot)
    publish(format_medians(medians), environment, {"command": "start", "measurements": measurements}, options.json)


def write_inputs(folder: Path, model: Path, rows: int) -> Path:
    """Write rows of about 130 tokens and a recipe that trains them, and return the recipe."""
    folder.mkdir()
    generator = random.Random(rows)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(rows):
            texts = [" ".join(generator.choices(_TEXT.split(), k=7)) for _ in range(3)]
            roles = ("system", "user", "assistant")
            texts[1] += f" {number}?"
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            lines.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "max_length": 2_048,
            "packing": True,
            "cache_dir": str(folder / "cache"),
        },
        "training": {
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": False,
            "bf16": False,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        "output_dir": str(folder / "output"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def measure(command: Sequence[str], folder: Path) -> Figures:
    """Run a command and return its usage (usage.py). Raises UserError if it fails."""
    task = json.dumps({"usage_file": str(folder / "usage.json"), "command": [*command]})
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        with running(script_command("usage", task), log, {"CUDA_VISIBLE_DEVICES": ""}) as child:
            code = child.wait()
        if code:
            raise UserError(f"{' '.join(command)}: {failure_reason(log, code)}")
    usage: Figures = json.loads((folder / "usage.json").read_text(encoding="utf-8"))
    return usage


def compute_medians(measurements: Sequence[Figures]) -> list[Figures]:
    """Return the medians of each phase and number of rows."""
    medians = []
    for phase in (IMPORTS, *PHASES):
        for rows in sorted({run["rows"] for run in measurements if run["phase"] == phase}):
            runs = [run for run in measurements if (run["phase"], run["rows"]) == (phase, rows)]
            keys = ("process_seconds", "cpu_seconds", "peak_memory")
            medians.append(
                {"phase": phase, "rows": rows, **{key: statistics.median(run[key] for run in runs) for key in keys}}
            )
    return medians


def format_medians(medians: Sequence[Figures]) -> str:
    """Return the table: a line for each phase and number of rows."""
    heads = ("", "rows", "seconds", "CPU seconds", "peak memory of the largest process")
    return format_table(
        heads,
        [
            (
                line["phase"],
                f"{line['rows']:,}" if line["rows"] else "",
                f"{line['process_seconds']:.1f}",
                f"{line['cpu_seconds']:.1f}",
                f"{line['peak_memory'] / 1e9:.2f} GB",
            )
            for line in medians
        ],
    )


def draw(medians: Sequence[Figures], file: Path) -> None:
    """Draw seconds and memory of each phase by rows."""
    with new_figure(file, 10, 4.5, ncols=2) as (_, (seconds, memory)):
        for axes, key, label, unit in (
            (seconds, "process_seconds", "seconds", 1),
            (memory, "peak_memory", "peak memory, GB", 1e9),
        ):
            for phase in PHASES:
                lines = [line for line in medians if line["phase"] == phase]
                axes.plot([line["rows"] for line in lines], [line[key] / unit for line in lines], "o-", label=phase)
            axes.set(xlabel="rows", ylabel=label, ylim=(0, None))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.3)
        seconds.legend()
