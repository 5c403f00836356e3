"""Measure training steps on one GPU: kernels, settings of a recipe, TRL's defaults, a profile.

    python scripts/benchmark.py train --json train.json
    python scripts/benchmark.py train --config tiny --minutes 1

The most valuable measurements come first, and those that don't fit into the time are skipped. Each is printed and
written as it comes; one that fails is a line with its reason. Steps are those of a model with random weights: nothing
is downloaded. The second command is a dry run on a CPU.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import end, failure_reason, running
from benchmarks.record import check_json_file, describe_environment, format_environment
from benchmarks.training_settings import select_names
from benchmarks.training_table import (
    Line,
    baseline_file,
    best_settings,
    format_line,
    format_table,
    ratios,
    read_baseline,
)
from train.cli import non_negative_int, positive_float, positive_int
from train.errors import UserError
from train.preflight.json_report import write_json
from train.storage.jsonl import read_json_lines

_PACKAGES = (
    *("janus-sft", "trl", "transformers", "torch", "triton", "accelerate", "peft", "bitsandbytes", "torchao"),
    *("kernels", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4"),
)
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""As in scripts/slurm/job.sh: what the user has set stays."""
_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
WORKER = (sys.executable, "-m", "benchmarks.training_worker")
_POLL_SECONDS = 0.1
_TOKENS_PER_ROW = 1_000
"""A little less than the mean of the generated rows, most of which are shorter."""
_SEQUENCES_PER_STEP = 8
"""Twice the largest micro-batch, so that an epoch ends in no timed step: of the dry run's rows half are too long."""
_LENGTHS = {"tiny": 1_024}
_LENGTH = 8_192


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser("train", help="training steps: TRL's defaults and ours", description=__doc__)
    add = parser.add_argument
    about_json = "record, a new file (default %(default)s); the profile is written beside it"
    add("--json", type=Path, default=Path("train.json"), metavar="FILE", help=about_json)
    add("--minutes", type=positive_float, default=10.0, metavar="N", help="time for all (default %(default)g)")
    about_config = "a model's config.json, mistral-7b-v0.2 (default) or tiny; a small GPU takes fewer of its layers"
    add("--config", default="mistral-7b-v0.2", metavar="FILE_OR_NAME", help=about_config)
    about_only = "measurements whose names match, such as full,*compile=on*; complete names can be any combination"
    add("--only", metavar="PATTERN,...", help=about_only)
    add("--list", action="store_true", help="print the names of the measurements and make none")
    about_limit = "longest time of one measurement (default %(default)g)"
    add("--limit", type=positive_float, default=150.0, metavar="SECONDS", help=about_limit)
    add("--max-length", type=positive_int, help="tokens of a packed sequence (default 8,192; tiny: 1,024)")
    add("--warmup", type=positive_int, default=2, help="steps before the timed ones (default 2)")
    add("--steps", type=positive_int, default=5, help="timed steps; lines have medians (default 5)")
    add("--seed", type=non_negative_int, default=42, help="decides lengths, text and weights (default 42)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print each line as it comes, then the table and the best settings. Raises UserError."""
    deadline = time.monotonic() + 60 * options.minutes
    names = select_names(options.only)
    if options.list:
        print("\n".join(names))
        return
    check_json_file(options.json)
    # transformers takes seconds to import, and a list of names or a mistake in an option should not
    from benchmarks.training_inputs import load_workload

    length = options.max_length or _LENGTHS.get(options.config, _LENGTH)
    rows = _SEQUENCES_PER_STEP * (options.warmup + options.steps) * max(length, _TOKENS_PER_ROW) // _TOKENS_PER_ROW
    workload = asdict(load_workload(options.config, rows, length, options.warmup, options.steps, options.seed))
    environment = describe_environment(_PACKAGES)
    print(format_environment(environment), flush=True)
    record: dict[str, Any] = {"command": "train", "workload": workload, **environment, "measurements": []}
    lines: list[Line] = record["measurements"]
    baseline: dict[str, Line] = {}
    with TemporaryDirectory(prefix="janus-benchmark-") as folder:
        task = {
            "workload": workload,
            "folder": folder,
            "trace": str(options.json.with_suffix(".trace.json.gz")),
            "ends": time.time() + deadline - time.monotonic(),
        }
        for line in measure(names, task, deadline, options.limit, WORKER):
            lines.append(line)
            if line["name"] == "machine":
                if "device" not in line:
                    raise UserError(f"the device can't be measured: {line.get('reason') or line['skipped']}")
                try:
                    baseline = read_baseline(baseline_file(line["device"]), workload)
                except UserError as error:
                    print(f"note: nothing is compared with an earlier run: {error}", flush=True)
            record |= {"ratios": ratios(lines, baseline), "best": best_settings(lines)}
            write_json(record, options.json)
            print(format_line(line, lines[0], record["ratios"].get(line["name"], {})), flush=True)
    _print_summary(record, options.json)


def measure(
    names: list[str], task: dict[str, Any], deadline: float, limit: float, worker: Sequence[str]
) -> Iterator[Line]:
    """Yield the line of each measurement as it comes.

    They run in a process of their own: where it dies, hangs for more than `limit` seconds, or leaves the device in a
    bad state, another continues with the rest. At `deadline` (time.monotonic) the rest is skipped.
    """
    folder, missing = Path(task["folder"]), list(names)
    results = folder / "results.jsonl"
    while missing:
        before = len(missing)
        command = [*worker, json.dumps({**task, "names": missing})]
        with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            with running(command, log, _environment(folder)) as child:
                last, ended = time.monotonic(), False
                while not ended and time.monotonic() < min(last + limit, deadline):
                    time.sleep(_POLL_SECONDS)
                    ended = child.poll() is not None  # before the file is read, which then is complete
                    for measured in _new_lines(results, len(names) - len(missing)):
                        last = time.monotonic()
                        missing.remove(measured["name"])
                        yield measured
                if not ended:
                    end(child)
            if not missing or (child.returncode == 0 and len(missing) < before):
                continue
            line: Line = {"name": missing.pop(0), "took": time.monotonic() - last}
            if ended:
                line["reason"] = failure_reason(log, child.returncode)
            elif time.monotonic() >= deadline:
                line["skipped"] = "stopped at the end of --minutes"
            else:
                line["reason"] = f"not done after {limit:g} seconds (--limit)"
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        yield line
        if time.monotonic() >= deadline:
            yield from ({"name": name, "skipped": "no time is left"} for name in missing)
            return


def _new_lines(results: Path, count: int) -> list[Line]:
    return read_json_lines(results)[count:] if results.exists() else []


def _environment(folder: Path) -> dict[str, str]:
    """Return additions to the environment of a process: one GPU, no hub, and caches in `folder`."""
    allocator = {} if any(os.environ.get(name) for name in ALLOCATOR_VARIABLES) else _ALLOCATOR
    return allocator | {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def _print_summary(record: dict[str, Any], file: Path) -> None:
    lines, workload = record["measurements"], record["workload"]
    machine = lines[0]
    print(f"\n{format_table(lines, record['ratios'])}\n")
    config = workload["config"]
    print(
        f"Medians of {workload['steps']} steps after {workload['warmup']}: {config['model_type']} with "
        f"{machine['layers']} of {machine['of_layers']} layers, hidden size {config['hidden_size']:,}, random weights; "
        f"sequences of {workload['max_length']:,} tokens of rows with Janus-like lengths, seed {workload['seed']}. "
        "MFU and FLOPs: by the convention of train/model/flops.py. x TRL: tokens/s, TRL's SFTTrainer with its "
        f"defaults and the same weights. x earlier: {baseline_file(machine['device']).name}"
        " with the same workload, layers, optimizer and recipe (–: it has no such line)."
    )
    if skipped := sum("skipped" in line for line in lines):
        print(f"{skipped} measurements were skipped for lack of time: --only or more --minutes measures them.")
    for group, best in record["best"].items():
        print(f"\nBest for {group} ({best['tokens_per_second']:,.0f} tokens/s), {best['recipe']}:")
        print(f"  {shlex.join(best['overrides'])}")
        if best["optimizer"] != best["recipe_optimizer"]:
            print(f"  (measured with {best['optimizer']}, as the recipe's {best['recipe_optimizer']} is not installed)")
    if record["best"]:
        print("\nKeep the recipe's sequences per step: GPUs x micro-batch x training.gradient_accumulation_steps.")
    print(f"\nEvery measurement is in {file}.")
    if any("tokens_per_second" in line for line in lines):
        print("To compare later runs on this kind of GPU with it:")
        print(f"  cp {shlex.quote(str(file))} {shlex.quote(os.path.relpath(baseline_file(machine['device'])))}")
