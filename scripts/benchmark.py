r"""Measure this trainer beside others, on the same rows, in one run.

    python scripts/benchmark.py data \
        --tokenizer outputs/smollm2-135m-instruct --json data.json
    python scripts/benchmark.py train --json train.json --minutes 8
    python scripts/benchmark.py sysgen \
        --distilabel distilabel/bin/python --json sysgen.json

data: preparing rows for training (read, render, tokenize, label, pack) by TRL and by us, beside the bare tokenizers.

train: steps of a 7B with random weights on one GPU, by TRL with its defaults and by us under several settings.

sysgen: SYSGEN's four calls for each row, to a server that takes the same time for each, by distilabel and by us.

Prints a table in Markdown and writes every single measurement with the machine and the packages' versions as JSON.
Exit codes: 0 measured; 2 something has to be changed (one `error:` says what); 1 anything else.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from benchmarks.data_contenders import CONTENDERS
from benchmarks.sysgen import HOW_TO_INSTALL, compare_sysgen
from benchmarks.sysgen import Options as SysgenOptions
from benchmarks.training import Options as TrainOptions
from benchmarks.training import compare_trainers
from benchmarks.training_settings import CONFIGS, FACTORS, Lengths, model_config

from train.cli import CommandLine
from train.errors import UserError
from train.preflight.json_report import write_json
from train.warning_filters import filter_known_warnings

DATA_PACKAGES = ("janus-sft", "trl", "transformers", "tokenizers", "fastokens", "datasets", "pyarrow", "numpy", "torch")
TRAIN_PACKAGES = (
    *("janus-sft", "trl", "transformers", "torch", "triton", "accelerate", "peft", "bitsandbytes", "liger-kernel"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)

SYSGEN_PACKAGES = ("janus-sft", "openai", "httpx2", "httpcore2", "h11", "anyio")


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, bytes of memory, Python and kernel, and the load before it began."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in information.read_text("utf-8").splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Version of each package; None where it isn't installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(where: dict[str, Any], packages: dict[str, str | None]) -> str:
    """The machine and the packages in one line of Markdown."""
    named = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return (
        f"Machine: {where['cores']} cores of {where['cpu']}, {where['memory_bytes'] / 2**30:.0f} GiB, "
        f"{where['system']}, Python {where['python']} (load before the run: {where['load_before']}). Packages: {named}."
    )


def data(options: argparse.Namespace) -> None:
    """The command `data`."""
    from benchmarks.data import Options, compare_preparations  # takes seconds: it imports torch

    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from /proc/PID/smaps_rollup, which this system lacks: run it on Linux")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    where, packages = machine(), versions(DATA_PACKAGES)
    result = compare_preparations(
        Options(
            tokenizer=options.tokenizer,
            template=options.template,
            contenders=tuple(options.only.split(",")) if options.only else None,
            rows=tuple(options.memory or (10_000, 100_000)) if options.memory is not None else (options.rows,),
            only_memory=options.memory is not None,
            repeat=options.repeat,
            max_length=options.max_length,
            processes=options.processes,
            seed=options.seed,
        )
    )
    print(f"\n{result.markdown()}\n\n{describe(where, packages)}")
    if options.json:
        record = {"command": "data", "machine": where, "versions": packages, **result.record()}
        options.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"every measurement is in {options.json}")


def train(options: argparse.Namespace) -> None:
    """The command `train`."""
    asked = TrainOptions(
        file=options.json,
        lengths=Lengths(
            config=model_config(options.config),
            rows=options.rows,
            max_length=options.max_length,
            batch=options.batch,
            warmup=options.warmup,
            steps=options.steps,
            seed=options.seed,
        ),
        patterns=tuple(options.only.split(",")) if options.only else None,
        all=options.all,
        again=options.again,
        seconds=None if options.minutes is None else options.minutes * 60,
        limit=options.limit,
    )
    if options.list:
        for contender in asked.contenders(None):
            values = {factor: value for factor, value in contender.settings().items() if factor in FACTORS and value}
            print(contender.name, "(TRL's defaults)" if contender.dtype else f"({', '.join(values.values())})")
        return
    if options.json is None:
        raise UserError(
            "--json: name a file. Each measurement is kept there, and the same command goes on with the rest."
        )
    where, packages = machine(), versions(TRAIN_PACKAGES)
    record = compare_trainers(asked, where, packages)
    device = record.device
    size = "" if device["memory_bytes"] is None else f" of {device['memory_bytes'] / 2**30:.0f} GiB"
    peak = "unknown, so no MFU" if device["peak_flops"] is None else f"{device['peak_flops'] / 1e12:,.0f} TFLOP/s"
    print(f"\n{record.markdown()}\n\nDevice: {device['device']}{size}, peak {peak}. {describe(where, packages)}")
    print(f"every measurement is in {options.json}")


def sysgen(options: argparse.Namespace) -> None:
    """The command `sysgen`."""
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: there is no folder {options.json.parent}")
    only_memory = options.memory is not None
    where, packages = machine(), versions(SYSGEN_PACKAGES)
    result = compare_sysgen(
        SysgenOptions(
            rows=tuple(sorted(set(options.memory or (1_000, 100_000)))) if only_memory else (options.rows,),
            only_memory=only_memory,
            latency=0.0 if only_memory else options.latency,
            concurrency=options.concurrency,
            repeat=options.repeat,
            contenders=tuple(options.only.split(",")) if options.only else None,
            distilabel=options.distilabel,
            input_batch_size=options.input_batch_size,
            limit=options.limit,
            seed=options.seed,
        )
    )
    print(f"\n{result.markdown()}\n\n{describe(where, packages)}")
    if options.json:
        write_json({"command": "sysgen", "machine": where, "versions": packages, **result.record()}, options.json)
        print(f"every measurement is in {options.json}")


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _latency(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _positive(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main() -> int:
    """Run the command; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    about_data = "preparation of data: TRL's, ours, and the bare tokenizers"
    data_parser = commands.add_parser(
        "data",
        help=about_data,
        description=f"""Measure {about_data}.

    python scripts/benchmark.py data --json data.json \\
        --tokenizer outputs/smollm2-135m-instruct --rows 2000""",
    )
    data_parser.set_defaults(run=data)
    add = data_parser.add_argument
    add("--tokenizer", required=True, metavar="FOLDER_OR_ID", help="a model folder, or an id on the Hugging Face hub")
    add("--template", default="chatml", help="chat template, with generation marks, which TRL needs (default chatml)")
    add("--rows", type=_count, default=20_000, help="Janus-like rows to make (default 20,000)")
    add("--repeat", type=_count, default=5, help="runs of each; the table has medians (default 5)")
    add("--max-length", type=_count, default=8_192, help="tokens of a packed sequence (default 8,192, as in the paper)")
    add("--json", type=Path, metavar="FILE", help="write every measurement there")
    add("--only", metavar="NAME,...", help=f"some of {','.join(CONTENDERS)} (default all; with --memory ours)")
    add("--processes", type=_count, default=cores(), help="processes of trl-N (default: cores, here %(default)s)")
    add("--seed", type=int, default=42, help="decides every character of the rows (default 42)")
    about_memory = "compare peak memory between these numbers of rows instead (default 10000 100000)"
    add("--memory", type=_count, nargs="*", metavar="ROWS", help=about_memory)

    about_train = "training steps: TRL's defaults and ours under several settings"
    train_parser = commands.add_parser(
        "train",
        help=about_train,
        description=f"""Measure {about_train}.

    python scripts/benchmark.py train --json train.json --minutes 8""",
    )
    train_parser.set_defaults(run=train)
    add = train_parser.add_argument
    about_json = "keep every measurement there; a file that is there is gone on with: what it has is not measured again"
    add("--json", type=Path, metavar="FILE", help=about_json)
    about_config = f"a model's config.json, or one of {', '.join(CONFIGS)} (default %(default)s)"
    add("--config", default=next(iter(CONFIGS)), metavar="FILE_OR_NAME", help=about_config)
    about_only = "contenders whose names fit, such as full,*liger=on*; whole names can be any combination"
    add("--only", metavar="PATTERN,...", help=about_only)
    about_all = "every combination, in place of one change at a time (the attention kernel that auto stands for twice)"
    add("--all", action="store_true", help=about_all)
    add("--list", action="store_true", help="print the contenders and run none")
    add("--again", action="store_true", help="measure again what the file has already, failures too")
    add(
        "--minutes",
        type=_positive,
        metavar="N",
        help="stop after N minutes; the same command continues (default: no limit)",
    )
    about_limit = "most seconds that one contender may take (default %(default)g)"
    add("--limit", type=_positive, default=240.0, metavar="SECONDS", help=about_limit)
    add("--rows", type=_count, default=2_000, help="Janus-like rows to make (default 2,000)")
    add("--max-length", type=_count, default=8_192, help="tokens of a packed sequence (default 8,192, as in the paper)")
    add("--batch", type=_count, default=1, help="sequences a step (default 1)")
    add("--warmup", type=_count, default=4, help="steps before those that count (default 4)")
    add("--steps", type=_count, default=10, help="steps that count; the table has medians (default 10)")
    add("--seed", type=int, default=42, help="decides lengths, ids and weights (default 42)")

    about_sysgen = "SYSGEN's four calls a row at full speed: distilabel's and ours"
    sysgen_parser = commands.add_parser(
        "sysgen",
        help=about_sysgen,
        description=f"""Measure {about_sysgen}.

    python scripts/benchmark.py sysgen --only ours --json sysgen.json""",
    )
    sysgen_parser.set_defaults(run=sysgen)
    add = sysgen_parser.add_argument
    add("--rows", type=_count, default=2_000, help="questions with answers to make (default 2,000)")
    add("--latency", type=_latency, default=0.2, metavar="SECONDS", help="until each answer (default %(default)s)")
    add("--concurrency", type=_count, default=64, help="most requests at once (default %(default)s); one more gets 429")
    add("--repeat", type=_count, default=1, help="runs of each; the table has medians (default 1)")
    add("--json", type=Path, metavar="FILE", help="write every measurement there")
    add("--only", metavar="NAME,...", help="some of bare,ours,distilabel (default all; with --memory ours)")
    add("--distilabel", metavar="PYTHON", help=f"the Python that has distilabel: {HOW_TO_INSTALL}")
    about_batch = "requests that one of distilabel's tasks sends at once (default %(default)s)"
    add("--input-batch-size", type=_count, default=64, metavar="ROWS", help=about_batch)
    about_limit = "most seconds that one run may take (default %(default)g)"
    add("--limit", type=_positive, default=3_600.0, metavar="SECONDS", help=about_limit)
    add("--seed", type=int, default=42, help="decides every character of the rows (default 42)")
    about_memory = "compare peak memory between these numbers of rows instead, without latency (default 1000 100000)"
    add("--memory", type=_count, nargs="*", metavar="ROWS", help=about_memory)

    options = parser.parse_args()
    try:
        options.run(options)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
