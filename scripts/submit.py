r"""Submit a recipe to Slurm after checking it, so that errors don't wait in the queue.

    python scripts/submit.py --recipe recipes/janus-7b/sft/full.yaml \
        --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu --print

    python scripts/submit.py --recipe recipes/janus-7b/sft/full.yaml \
        --nodes 2 --gpus-per-node 8 --time 24:00:00 \
        --array 0-3 seed=%a output_dir=outputs/seed-%a

`--print` shows the batch script and submits nothing. Slurm warns the job before its time limit; the job then saves,
requeues itself and resumes. It ends when training has finished or failed, after --max-restarts requeues, or after an
attempt without progress. `--array 0-3` submits one task per number, which replaces %a in the overrides.

Exit codes: 0 submitted; 2 an error to fix (one `error:` names it); 1 anything else.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from slurm.batch_script import CPUS_PER_GPU, Task, render_script
from slurm.submit_checks import check_launch, check_task, memory_warning, run_data_check

from train.cli import CommandLine, run_command
from train.errors import UserError
from train.recipe import load_recipe
from train.warning_filters import filter_known_warnings

WARNING_SECONDS = 600
"""Default of --warn-before; a quarter of the time limit where that is less."""
RESERVED_OPTIONS = {
    f"--{name}"
    for name in (
        *("array", "chdir", "export", "gpus-per-node", "nodes", "no-requeue", "ntasks-per-node", "open-mode", "output"),
        *("requeue", "signal", "time"),
    )
} | {"-a", "-D", "-N", "-o", "-t"}
"""Options of sbatch that submit.py sets itself. --export would also show secrets."""
GPU_OPTIONS = ("--gres", "--gpus", "-G", "--constraint", "-C")
"""Options of sbatch that may name the type of the GPUs."""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; derived values (gpus, gpu_names, seconds, numbers) are added to it."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("--recipe", required=True, type=Path, metavar="FILE", help="recipe to train (YAML)")
    add("--nodes", required=True, type=int, metavar="N", help="number of nodes")
    add("--gpus-per-node", required=True, metavar="[TYPE:]G", help="such as 8 or h100:8; 0 = one CPU process per node")
    add("--time", required=True, metavar="LIMIT", help="time limit of one attempt, such as 24:00:00 or 2-12:00:00")
    add("--partition", metavar="NAME", help="Slurm partition (default: the cluster's)")
    add("--account", metavar="NAME", help="Slurm account (default: yours)")
    add("--qos", metavar="NAME", help="Slurm quality of service (default: yours)")
    add("--mem", metavar="SIZE", help="memory per node, such as 500G; 0 = all of it (default: the cluster's)")
    add("--cpus-per-node", type=int, metavar="C", help=f"CPUs per node (default: {CPUS_PER_GPU} per GPU)")
    add("--array", metavar="0-3", help="submit one task per number; %%a in overrides is replaced by it")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--nice")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line at the start of the job: module load cuda",
    )
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration of accelerate (default: zero3.yaml, for several nodes zero3_multinode.yaml)",
    )
    add(
        "--warn-before",
        type=int,
        metavar="SECONDS",
        help=f"seconds before the time limit at which the job saves (default: {WARNING_SECONDS}, or a quarter of it)",
    )
    add("--max-restarts", type=int, default=20, metavar="N", help="maximum number of requeues (default: 20)")
    add("--resume-anyway", action="append", default=[], metavar="KEY", help="passed to train/sft.py")
    add("--check", action="store_true", help="check the data too before submitting, as train/sft.py --check does")
    add("--print", action="store_true", help="show the batch script and submit nothing")
    add("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    options = parser.parse_intermixed_args(arguments)
    gpus = re.fullmatch(r"(?:([\w.-]+):)?(\d+)", options.gpus_per_node)
    if not gpus:
        parser.error(f"--gpus-per-node: found {options.gpus_per_node!r}. Write a number, or type and number: h100:8")
    options.gpus = int(gpus[2])
    sbatch_options = (option.partition("=") for option in options.sbatch)
    options.gpu_names = [gpus[1] or "", *(value for name, _, value in sbatch_options if name in GPU_OPTIONS)]
    if options.nodes < 1:
        parser.error(f"--nodes: found {options.nodes}. Write an integer >= 1")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts: found {options.max_restarts}. Write an integer >= 0; 0 = never requeue")
    for option in options.sbatch:
        if (name := option.partition("=")[0]) in RESERVED_OPTIONS or "\n" in option:
            parser.error(f"--sbatch: {name} is set by submit.py itself, from options of its own (--help)")
    try:
        options.seconds = seconds = parse_time_limit(options.time)
        options.numbers = parse_array(options.array) if options.array else []
    except ValueError as error:
        parser.error(str(error))
    if options.warn_before is None:
        options.warn_before = min(WARNING_SECONDS, seconds // 4)
    if not 0 < options.warn_before < min(seconds, 65_536):
        parser.error(f"--warn-before: found {options.warn_before}. Write seconds, fewer than the {seconds:,} of --time")
    if options.config is None:
        single_node = "zero3.yaml" if options.gpus else "cpu.yaml"
        options.config = Path("accelerate_configs") / (single_node if options.nodes == 1 else "zero3_multinode.yaml")
    return options


def parse_time_limit(limit: str) -> int:
    """Return the seconds of a time limit of Slurm: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ValueError(f"--time: found {limit!r}. Write hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_array(array: str) -> list[int]:
    """Return the task numbers of `0-3`, `1,5,7` or `0-10:2%4` (at most 4 at a time). Raises ValueError."""
    numbers: list[int] = []
    for part in array.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if not match or ("%" in array and not array.partition("%")[2].isdigit()) or match[3] == "0":
            raise ValueError(f"--array: found {array!r}. Write numbers as 0-3 or 1,5,7; 0-15%4 = at most 4 at a time")
        tasks = range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
        if not tasks:
            raise ValueError(f"--array: found {array!r}: {part} has no tasks. Write the smaller number first")
        numbers += tasks
    return numbers


def load_tasks(options: argparse.Namespace) -> list[Task]:
    """Return all tasks with their recipes. Raises UserError for an invalid recipe and a shared output_dir."""
    tasks = []
    for number in options.numbers or [None]:
        overrides = options.overrides
        if number is not None:
            overrides = [override.replace("%a", str(number)) for override in overrides]
        tasks.append(Task(overrides, load_recipe(options.recipe, overrides)))
    if len({task.recipe.output_dir for task in tasks}) < len(tasks):
        raise UserError(
            "--array: all tasks would write to the same output_dir. Override it with the number of the task: "
            f"output_dir={tasks[0].recipe.output_dir}-%a."
        )
    return tasks


def submit(options: argparse.Namespace) -> None:
    """Check the job, render its script, and submit or print it. Raises UserError."""
    tasks = load_tasks(options)
    config = check_launch(options)
    for task in tasks:
        check_task(options, config, task)
    warning = memory_warning(options, config, tasks)
    if options.check and (code := run_data_check(options, tasks[0])):
        raise SystemExit(code)
    script = render_script(options, config, tasks[0])
    if options.print:
        print(script, end="")
    else:
        _run_sbatch(options, tasks, script)
    if warning:  # last, so that it is not missed
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _run_sbatch(options: argparse.Namespace, tasks: list[Task], script: str) -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not found: submit on a machine with Slurm's commands, or see the script with --print."
        )
    for task in tasks:  # Slurm opens the log file first and creates no folders
        Path(task.recipe.output_dir).mkdir(parents=True, exist_ok=True)
    # Inside another job, the variables of that job would override the options of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    result = subprocess.run(
        ["sbatch", "--parsable"], input=script, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    if result.returncode:
        raise UserError(f"Slurm rejected the job: {' '.join(result.stderr.split())}")
    job = result.stdout.strip().partition(";")[0]
    folder = tasks[0].recipe.output_dir
    print(f"job {job}: {folder}/slurm-{job}{f'_{options.numbers[0]}' if options.array else ''}.log")
    print(f"to save and stop it: touch {folder}/stop; to cancel it: scancel {job}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    options = parse_options(arguments)
    return run_command(lambda: submit(options), "stopped; squeue shows whether a job was submitted")


if __name__ == "__main__":
    sys.exit(main())
