"""Measure training steps: TRL's defaults, and ours under several settings.

    python scripts/benchmark.py train --json train.json --minutes 8

Each contender trains in a process of its own, ours with train/sft.py; speed and memory are read from its metrics.jsonl.
The JSON file is written after each contender, and the same command continues with those that are missing. A contender
that fails is a line with its reason.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import PROJECT, end, failure_reason, read_lines, running, script_command
from benchmarks.record import check_json_folder, describe_environment, format_environment
from benchmarks.training_contenders import (
    CONFIGS,
    FACTORS,
    Contender,
    Workload,
    all_contenders,
    default_contenders,
    factors_of,
    load_model_config,
    match_contenders,
)
from benchmarks.training_record import Record, read_record
from benchmarks.training_table import format_line, format_table, summarize
from train.cli import non_negative_int, positive_float, positive_int
from train.errors import UserError
from train.progress import progress_bar
from train.recipe import Recipe, load_recipe
from train.warning_filters import filter_known_warnings

_PACKAGES = (
    *("janus-sft", "trl", "transformers", "torch", "triton", "accelerate", "peft", "bitsandbytes", "liger-kernel"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)
_LOG_LINES = 60
_POLL_SECONDS = 0.1


def add_to(commands: Any) -> None:
    """Add the command to those of benchmark.py."""
    parser = commands.add_parser("train", help="training steps: TRL's defaults and ours", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="record of all measurements; an existing one is continued")
    about_config = f"a model's config.json, or one of {', '.join(CONFIGS)} (default %(default)s)"
    add("--config", default=next(iter(CONFIGS)), metavar="FILE_OR_NAME", help=about_config)
    about_only = "contenders whose names match, such as full,*liger=on*; complete names can be any combination"
    add("--only", metavar="PATTERN,...", help=about_only)
    add("--all", action="store_true", help="measure every combination of changes, not one change at a time")
    add("--list", action="store_true", help="print the contenders and run none")
    add("--again", action="store_true", help="measure again what the file has already, failures too")
    about_minutes = "stop after N minutes; the same command continues (default: no limit)"
    add("--minutes", type=positive_float, metavar="N", help=about_minutes)
    about_limit = "longest time of one contender (default %(default)g)"
    add("--limit", type=positive_float, default=240.0, metavar="SECONDS", help=about_limit)
    add("--rows", type=positive_int, default=2_000, help="Janus-like rows to generate (default 2,000)")
    add("--max-length", type=positive_int, default=8_192, help="tokens of a packed sequence (default 8,192)")
    add("--batch", type=positive_int, default=1, help="sequences per step (default 1)")
    add("--warmup", type=positive_int, default=4, help="steps before the timed ones (default 4)")
    add("--steps", type=positive_int, default=10, help="timed steps; the table has medians (default 10)")
    add("--seed", type=non_negative_int, default=42, help="decides lengths, text and weights (default 42)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the contenders that the file lacks, while there is time, and print the table. Raises UserError."""
    deadline = None if options.minutes is None else time.monotonic() + options.minutes * 60
    workload = Workload(
        config=load_model_config(options.config),
        **{key: getattr(options, key) for key in ("rows", "max_length", "batch", "warmup", "steps", "seed")},
    )
    contenders = select_contenders(options, None)  # a misspelt name is reported at once
    if options.list:
        for contender in contenders:
            values = [value for factor, value in contender.settings().items() if factor in FACTORS and value]
            print(contender.name, "(TRL's defaults)" if contender.dtype else f"({', '.join(values)})")
        return
    if options.json is None:
        raise UserError("--json: name a file. It keeps each measurement, and the same command continues with the rest.")
    check_json_folder(options.json)
    if options.json.exists():
        read_record(options.json)
    environment = describe_environment(_PACKAGES)
    with TemporaryDirectory(prefix="janus-benchmark-") as folder:
        bench = TrainingBench(Path(folder), workload, options.limit, deadline)
        # A process of its own holds the GPU only for as long as it is needed.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, _set_environment, (bench.environment(Path(folder)),)) as worker:
            device = bench.probe(worker)
            record = Record(options.json, workload, {**environment, "device": device})
            contenders = select_contenders(options, device["automatic"])
            missing = [contender for contender in contenders if options.again or not record.has(contender)]
            if missing and bench.seconds_left() > 0:
                bench.write_inputs(worker)
        print("; because ".join([f"attention: auto is {device['automatic']}", *device["automatic_reasons"][:1]]))
        rest = bench.measure_all(missing, record)
    if rest:
        names = ", ".join(contender.name for contender in rest)
        print(f"not run for lack of time; the same command continues with them: {names}")
    size = "" if device["memory_bytes"] is None else f" of {device['memory_bytes'] / 2**30:.0f} GiB"
    peak = "unknown, so no MFU" if device["peak_flops"] is None else f"{device['peak_flops'] / 1e12:,.0f} TFLOP/s"
    print(f"\n{format_table(record.table(), record.content['settings'])}\n")
    print(f"Device: {device['device']}{size}, peak {peak}. {format_environment(environment)}")
    print(f"every measurement is in {options.json}")


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    filter_known_warnings()


def select_contenders(options: argparse.Namespace, automatic: str | None) -> list[Contender]:
    """Return the contenders of the options; `automatic` as in `default_contenders`. Raises UserError."""
    listed = all_contenders() if options.all else default_contenders(automatic)
    return match_contenders(options.only.split(",") if options.only else None, listed)


@dataclass(frozen=True)
class TrainingBench:
    """Measures contenders one after the other.

    - `folder`: temporary files; `workload`: the steps to train;
    - `limit`: seconds that one contender may take; `deadline`: end of the call (time.monotonic), None = no end.
    """

    folder: Path
    workload: Workload
    limit: float
    deadline: float | None

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def environment(self, folder: Path) -> dict[str, str]:
        """Return additions to the environment of a process: one GPU, no hub, and empty caches in `folder`."""
        return {
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }

    def probe(self, worker: ProcessPoolExecutor) -> dict[str, Any]:
        """Return the facts of the device. Raises UserError if it can't be used."""
        from benchmarks.training_model import probe_device

        recipe = self.recipe(all_contenders()[0], self.folder)
        try:
            return worker.submit(probe_device, self.workload, recipe).result()
        except RuntimeError as error:  # of the driver
            raise UserError(f"the device can't be used: {error}") from error

    def write_inputs(self, worker: ProcessPoolExecutor) -> None:
        """Write the model folder and the rows that all contenders read."""
        from benchmarks.training_model import write_model, write_rows

        write_rows(self.workload, self.folder / "rows.jsonl")
        worker.submit(write_model, self.workload, self.folder / "model").result()

    def recipe(self, contender: Contender, folder: Path) -> Recipe:
        """Return the contender's recipe with the same model, rows and steps for all. It writes into `folder`."""
        workload = self.workload
        return contender.load_recipe(
            [
                f"model.name_or_path={json.dumps(str(self.folder / 'model'))}",
                f"data.sources={json.dumps([{'path': str(self.folder / 'rows.jsonl')}])}",
                f"data.cache_dir={json.dumps(str(folder / 'cache'))}",
                f"data.max_length={workload.max_length}",
                "data.validation=null",
                "model.allow_16bit_training=true",  # speed is measured, and TRL's weights are bfloat16 too
                f"training.per_device_train_batch_size={workload.batch}",
                "training.gradient_accumulation_steps=1",
                f"training.max_steps={workload.warmup + workload.steps}",
                "training.logging_steps=1",
                "training.eval_strategy='no'",
                "training.save_strategy='no'",
                "tracking.wandb=null",
                f"output_dir={json.dumps(str(folder / 'run'))}",
                f"seed={workload.seed}",
            ]
        )

    def measure_all(self, contenders: Sequence[Contender], record: Record) -> list[Contender]:
        """Measure one contender after the other; return those that are left at the deadline.

        None is started in less time than the fastest took; one that runs at the deadline is stopped and counts as left.
        """
        shortest = 0.0
        with progress_bar("measuring", total=len(contenders), unit="contenders") as measuring:
            for index, contender in enumerate(contenders):
                began = time.monotonic()
                if self.seconds_left() <= shortest:
                    return list(contenders[index:])
                measurement = _refuse_kernel(contender, record.device) or self.measure(contender, record.device)
                if measurement is None:
                    return list(contenders[index:])
                record.add(measurement)
                if "steps" in measurement:
                    seconds = time.monotonic() - began
                    shortest = min(shortest or seconds, seconds)
                measuring.advance()
                line = format_line(summarize(measurement, record.device["peak_flops"]))
                measuring.show(f"{measuring.done}/{measuring.total} {line}")
        return []

    def measure(self, contender: Contender, device: dict[str, Any]) -> dict[str, Any] | None:
        """Train with one contender in a process of its own; None if the deadline came first."""
        from benchmarks.training_model import plan_memory

        folder = self.folder / contender.name
        (folder / "run").mkdir(parents=True)
        recipe = self.recipe(contender, folder)
        measurement = {"name": contender.name, "settings": contender.settings()}
        measurement |= plan_memory(recipe, self.workload, device)
        recipe_file = folder / "recipe.yaml"
        recipe_file.write_text(recipe.to_yaml(), encoding="utf-8")
        if contender.dtype:
            del measurement["foretold"]
            task = {"recipe": recipe_file, "rows": self.folder / "rows.jsonl", "folder": folder / "run"}
            arguments = json.dumps({**task, "dtype": contender.dtype}, default=str)
            command = script_command("training_trl", arguments)
        else:
            command = [sys.executable, str(PROJECT / "train" / "sft.py"), "--recipe", str(recipe_file)]
        began, seconds = time.monotonic(), min(self.limit, self.seconds_left())
        lines: list[dict[str, Any]] = []
        first_step = None
        wanted_steps = self.workload.warmup + self.workload.steps
        with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            with running(command, log, self.environment(folder)) as child:
                while len(lines) < wanted_steps and child.poll() is None and time.monotonic() < began + seconds:
                    time.sleep(_POLL_SECONDS)
                    lines = _read_steps(folder / "run" / "metrics.jsonl")
                    if lines and first_step is None:
                        first_step = time.monotonic() - began
                stopped = child.poll() is None
                if stopped:
                    end(child)  # also after the last step: saving the model is not measured
            lines = _read_steps(folder / "run" / "metrics.jsonl")
            reason = failure_reason(log, child.returncode)
            log_lines = read_lines(log)[-_LOG_LINES:]
        used = _used_settings(folder / "run", device)
        shutil.rmtree(folder)
        if used:
            measurement["used"] = used
        if len(lines) >= wanted_steps:
            steps = [parse_step(line, line["step"] <= self.workload.warmup, device) for line in lines]
            memory = lines[-1]["peak_memory_gib"]
            return {
                **measurement,
                "seconds_to_first_step": first_step,
                "memory": None if device["memory_bytes"] is None else {"peak_allocated": round(memory * 2**30)},
                "steps": steps,
            }
        if stopped:
            if seconds < self.limit:
                return None
            reason = f"not done after {self.limit:g} seconds (--limit)"
        return {**measurement, "reason": reason, "log": log_lines}


def _refuse_kernel(contender: Contender, device: dict[str, Any]) -> dict[str, Any] | None:
    """Return the failure of a contender whose attention kernel can't be used here; None if it can."""
    reason = device["kernels"].get(dict(contender.changes).get("attention"))
    return reason and {"name": contender.name, "settings": contender.settings(), "reason": reason, "refused": True}


def _read_steps(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl that belong to steps."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return [line for line in lines if "loss" in line]


def parse_step(line: dict[str, Any], warmup: bool, device: dict[str, Any]) -> dict[str, Any]:
    """Return a step's seconds, tokens and FLOPs from its line of metrics.jsonl."""
    clock = line["seconds_per_step"]
    # On a GPU the host's clock stops before the optimizer's kernels have finished; those of the parts do not.
    parts = (line.get(f"seconds_{part}", 0.0) for part in ("waiting_for_data", "forward", "backward", "optimizer"))
    step = {
        "warmup": warmup,
        "seconds": max(clock, sum(parts)),
        "tokens": round(line["tokens_per_second"] * clock),
        "trained_tokens": round(line["trained_tokens_per_second_per_gpu"] * clock),
        "flops": line["mfu"] * device["peak_flops"] * clock if "mfu" in line else line.get("flops"),
        "loss": float(line["loss"]),
    }
    return {**step, "documents": line["documents"]} if "documents" in line else step


def _used_settings(folder: Path, device: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that a run trained with: those that TRL chose, or those of the run's own recipe.yaml."""
    if (file := folder / "settings.json").exists():
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return settings
    if not (folder / "recipe.yaml").exists():
        return None
    recipe = load_recipe(folder / "recipe.yaml")
    factors = factors_of(recipe)
    kernel = device["automatic"] if factors["attention"] == "auto" else factors["attention"]
    logging_steps = recipe.training["logging_steps"]
    return {**factors, "attention": kernel, "dtype": recipe.model.dtype, "logging_steps": logging_steps}
