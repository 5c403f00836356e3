r"""Submit a recipe to Slurm, after checking it: a typo never waits in a queue.

    python scripts/submit.py --recipe recipes/janus-7b/sft/full.yaml \
        --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu --print

    python scripts/submit.py --recipe recipes/janus-7b/sft/full.yaml \
        --nodes 2 --gpus-per-node 8 --time 24:00:00 \
        --array 0-3 seed=%a output_dir=outputs/seed-%a

`--print` shows the batch script and submits nothing. Slurm warns the job before its time is over; the job then saves,
requeues itself and resumes. It ends when training is finished or has failed, when it was requeued --max-restarts times,
or when an attempt made no progress. `--array 0-3` submits one task for each number, which replaces %a in the overrides.

Exit codes: 0 submitted; 2 something has to be changed (one `error:` says what); 1 anything else.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.cli import CommandLine, run_command
from train.errors import UserError
from train.preflight.missing_files import refuse_missing
from train.recipe import Recipe, load_recipe
from train.warning_filters import filter_known_warnings

ROOT = Path(__file__).parents[1]
WARNING = 600
"""Seconds before the end of its time at which a job is warned, or a quarter of that time where this is less."""
CPUS_PER_GPU = 8
OURS = {
    f"--{name}"
    for name in (
        *("array", "chdir", "export", "gpus-per-node", "nodes", "no-requeue", "ntasks-per-node", "open-mode", "output"),
        *("requeue", "signal", "time"),
    )
} | {"-a", "-D", "-N", "-o", "-t"}
"""Options of sbatch that --sbatch would contradict; --export would show secrets, too."""
NAME_GPUS = ("--gres", "--gpus", "-G", "--constraint", "-C")
"""Options of sbatch that may say which GPUs the nodes have."""


@dataclass(frozen=True)
class Task:
    """One task of an array, or the whole job: its recipe as it will be trained."""

    overrides: list[str]
    recipe: Recipe


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("--recipe", required=True, type=Path, metavar="FILE", help="what to train, as YAML")
    add("--nodes", required=True, type=int, metavar="N", help="how many nodes")
    add("--gpus-per-node", required=True, metavar="[TYPE:]G", help="such as 8 or h100:8; 0 = one CPU process a node")
    add("--time", required=True, metavar="LIMIT", help="limit of one attempt, as Slurm writes it: 24:00:00, 2-12:00:00")
    add("--partition", metavar="NAME", help="Slurm's partition (default: the cluster's)")
    add("--account", metavar="NAME", help="Slurm's account (default: yours)")
    add("--qos", metavar="NAME", help="Slurm's quality of service (default: yours)")
    add("--mem", metavar="SIZE", help="main memory of a node, such as 500G; 0 = all of it (default: the cluster's)")
    add("--cpus-per-node", type=int, metavar="C", help=f"CPUs of a node (default: {CPUS_PER_GPU} for each GPU)")
    add("--array", metavar="0-3", help="one task for each number; %%a in overrides stands for it")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any other option of sbatch: --sbatch=--nice")
    add(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line that the job runs first: module load cuda",
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
        help=f"seconds before the limit at which the job saves (default: {WARNING}, or a quarter of the limit)",
    )
    add(
        "--max-restarts",
        type=int,
        default=20,
        metavar="N",
        help="most times that the job requeues itself (default: 20)",
    )
    add("--resume-anyway", action="append", default=[], metavar="KEY", help="passed on to train/sft.py")
    add("--check", action="store_true", help="before submitting, examine the data too, as train/sft.py --check does")
    add("--print", action="store_true", help="show the batch script, submit nothing")
    add("overrides", nargs="*", metavar="key=value", help="override the recipe by dotted key")
    options = parser.parse_intermixed_args(arguments)
    gpus = re.fullmatch(r"(?:([\w.-]+):)?(\d+)", options.gpus_per_node)
    if not gpus:
        parser.error(f"--gpus-per-node: found {options.gpus_per_node!r}. Write a number, or type and number: h100:8")
    options.gpus = int(gpus[2])
    named = (option.partition("=") for option in options.sbatch)
    options.gpu_names = [gpus[1] or "", *(value for name, _, value in named if name in NAME_GPUS)]
    if options.nodes < 1:
        parser.error(f"--nodes: found {options.nodes}. Write 1 or more")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts: found {options.max_restarts}. Write 0 or more; 0 = never requeue")
    for option in options.sbatch:
        if (name := option.partition("=")[0]) in OURS or "\n" in option:
            parser.error(f"--sbatch: {name} is set by submit.py itself, from options of its own (--help)")
    try:
        options.seconds = seconds = seconds_of(options.time)
        options.numbers = numbers_of(options.array) if options.array else []
    except ValueError as fault:
        parser.error(str(fault))
    if options.warn_before is None:
        options.warn_before = min(WARNING, seconds // 4)
    if not 0 < options.warn_before < min(seconds, 65_536):
        parser.error(f"--warn-before: found {options.warn_before}. Write seconds, fewer than the {seconds:,} of --time")
    if options.config is None:
        alone = "zero3.yaml" if options.gpus else "cpu.yaml"
        options.config = Path("accelerate_configs") / (alone if options.nodes == 1 else "zero3_multinode.yaml")
    return options


def seconds_of(limit: str) -> int:
    """Seconds of a time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        raise ValueError(f"--time: found {limit!r}. Write hours:minutes:seconds or days-hours:minutes:seconds")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first or 0, second or 0, third or 0
    else:
        hours, minutes, seconds = 0, first or 0, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def numbers_of(array: str) -> list[int]:
    """The tasks of `0-3`, `1,5,7` or `0-10:2%4` (of which 4 at a time). Raises ValueError."""
    numbers: list[int] = []
    for part in array.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if not found or ("%" in array and not array.partition("%")[2].isdigit()) or found[3] == "0":
            raise ValueError(f"--array: found {array!r}. Write numbers as 0-3 or 1,5,7; 0-15%4 = at most 4 at a time")
        tasks = range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1))
        if not tasks:
            raise ValueError(f"--array: found {array!r}, in which {part} is no task. Write the smaller number first")
        numbers += tasks
    return numbers


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """The recipe of each task. Raises UserError for a recipe at fault, and for tasks that share an output_dir."""
    tasks = []
    for number in options.numbers or [None]:
        filled = [one.replace("%a", str(number)) for one in options.overrides] if number is not None else []
        overrides = filled or options.overrides
        tasks.append(Task(overrides, load_recipe(options.recipe, overrides)))
    if len({task.recipe.output_dir for task in tasks}) < len(tasks):
        raise UserError(
            "--array: its tasks would write into one output_dir. Override it with the task's number in it: "
            f"output_dir={tasks[0].recipe.output_dir}-%a."
        )
    return tasks


def check_launch(options: argparse.Namespace) -> dict[str, Any]:
    """Accelerate's configuration. Raises UserError where it can't start these processes from here."""
    try:
        config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as fault:
        raise UserError(f"--config: {options.config} can't be read from {Path.cwd()}: {fault}") from fault
    kind = str(config.get("distributed_type", "NO"))
    if kind == "NO" and options.nodes * max(options.gpus, 1) > 1:
        raise UserError(
            f"--config: {options.config} is for one process (distributed_type: NO), and there would be "
            f"{options.nodes * max(options.gpus, 1)}. Take one of accelerate_configs that is for several."
        )
    settings = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if settings and not Path(settings).is_file():
        raise UserError(
            f"--config: {options.config} names {settings}, which is not there in {Path.cwd()}. Submit from the folder "
            f"that it is in ({ROOT})."
        )
    return dict(config)


def check_recipe(recipe: Recipe, processes: int, anyway: list[str]) -> None:
    """Whatever can be known in seconds, without reading the data. Raises UserError."""
    refuse_missing(recipe)
    import torch

    from train.loop.optimizer_test import check_optimizer
    from train.model.folder import check_model_folder
    from train.model.load import check_model
    from train.model.tokenizer import check_vocabulary, load_chat_tokenizer
    from train.preflight.checks import run_faults

    if faults := run_faults(recipe, 0, processes):
        raise UserError(" ".join(faults))
    _check_checkpoint(recipe, anyway)
    check_model_folder(recipe.model)
    # A login node has no GPU to try kernels on: the nodes do that, before they load the model.
    anything = recipe.model.model_copy(update={"attention": "auto"})
    checked = check_model(recipe if torch.cuda.is_available() else recipe.model_copy(update={"model": anything}))
    check_optimizer(recipe)
    check_vocabulary(load_chat_tokenizer(recipe).tokenizer, recipe.model, checked.embeddings)


def _check_checkpoint(recipe: Recipe, anyway: list[str]) -> None:
    """Raise UserError where the newest checkpoint belongs to another run. Its files are left for the job to verify."""
    from train.loop.checkpoint.fingerprint import run_fingerprint
    from train.loop.checkpoint.manifest import COMPLETE, Checkpoint, list_checkpoints
    from train.loop.checkpoint.resume import refuse_changes

    for folder in list_checkpoints(recipe.output_dir, recipe.save.mirror_dir):
        try:
            manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            before = {key: value for key, value in manifest["run"].items() if not key.startswith("made.")}
        except (OSError, ValueError, KeyError):
            continue  # not whole: the job passes it over too
        refuse_changes(Checkpoint(folder, manifest), before, run_fingerprint(recipe), anyway)
        return


def render(options: argparse.Namespace, config: dict[str, Any], task: Task) -> str:
    """The batch script. `task`: the job's, or the first of its array."""
    words = shlex.join
    several = options.nodes > 1
    named = [value for key, _, value in (one.partition("=") for one in options.overrides) if key == "output_dir"]
    output_dir = named[-1] if options.array and named else task.recipe.output_dir
    in_pattern = output_dir if options.array else output_dir.replace("%", "%%")
    slurm = {
        "job-name": re.sub(r"\W*%a", "", Path(output_dir).name) or "janus-sft",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node if options.gpus else None,
        "cpus-per-task": options.cpus_per_node or CPUS_PER_GPU * options.gpus or None,
        "mem": options.mem,
        "array": options.array,
        "time": options.time,
        "signal": f"B:USR1@{options.warn_before}",
        "open-mode": "append",
        "output": f"{in_pattern}/slurm-{'%A_%a' if options.array else '%j'}.log",
        "chdir": Path.cwd(),
        "export": "ALL",
    }
    directives = [f"--{name}={shlex.quote(str(value))}" for name, value in slurm.items() if value is not None]
    launch = ["--config_file", str(options.config), "--num_machines", str(options.nodes)]
    launch += ["--num_processes", str(options.nodes * max(options.gpus, 1))]
    if several and config.get("distributed_type") == "DEEPSPEED":
        launch += ["--deepspeed_multinode_launcher", "standard"]
    anyway = [word for key in options.resume_anyway for word in ("--resume-anyway", key)]
    where = f"{options.nodes} {'nodes' if several else 'node'}"
    lines = [
        "#!/bin/bash",
        f"# {options.recipe} on {where}, {options.gpus} GPUs each. Written by scripts/submit.py of janus-sft.",
        f"# To submit it by hand: mkdir -p {shlex.quote(output_dir)} && sbatch THIS_FILE",
        "# --export=ALL hands on the environment of whoever submits it, keys for wandb and the hub included; none of",
        "# it is written here or printed.",
        *(f"#SBATCH {directive}" for directive in (*directives, "--requeue", *map(_quoted, options.sbatch))),
        "",
        *options.setup,
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"checkout={shlex.quote(str(ROOT))}",
        f"output_dir={shlex.quote(output_dir)}",
        f"max_restarts={options.max_restarts}",
        f"recipe=({words(['--recipe', str(options.recipe), *options.overrides])})",
        f"training=({words(anyway)})",
        f"launch=({words(launch)})",
        f"gpus={options.gpus}",
    ]
    if options.array:
        lines += [
            "# %a is the task's number",
            "output_dir=${output_dir//%a/$SLURM_ARRAY_TASK_ID}",
            'recipe=("${recipe[@]//%a/$SLURM_ARRAY_TASK_ID}")',
        ]
    return "\n".join(lines) + "\n" + (ROOT / "scripts" / "slurm" / "job.sh").read_text(encoding="utf-8")


def _quoted(option: str) -> str:
    """An option of sbatch as one word of the script: --comment=a b has a blank."""
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else option


def submit(options: argparse.Namespace) -> None:
    """Check, render, and submit or print. Raises UserError."""
    tasks = tasks_of(options)
    config = check_launch(options)
    for task in tasks:
        if options.seconds <= (before := task.recipe.save.seconds_before_end):
            raise UserError(
                f"--time: {options.time} is {options.seconds:,} s, and save.seconds_before_end is {before}: the job "
                "would stop after its first step. Ask for more time, or write fewer seconds."
            )
        with redirect_stdout(sys.stderr):  # what it tells is no part of the script
            check_recipe(task.recipe, options.nodes * max(options.gpus, 1), options.resume_anyway)
    too_large = next(filter(None, (memory_fault(options, config, task.recipe) for task in _different(tasks))), None)
    if options.check and (code := run_check(options, tasks[0])):
        raise SystemExit(code)
    script = render(options, config, tasks[0])
    if options.print:
        print(script, end="")
        _warn(too_large)
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not found: submit where Slurm's commands are, or look at the script with --print.")
    for task in tasks:  # Slurm opens the log before anything of ours runs, and makes no folders
        Path(task.recipe.output_dir).mkdir(parents=True, exist_ok=True)
    # Submitted from within a job, that job's own numbers would contradict these.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    sent = subprocess.run(
        ["sbatch", "--parsable"], input=script, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    if sent.returncode:
        raise UserError(f"Slurm did not take the job: {' '.join(sent.stderr.split())}")
    job = sent.stdout.strip().partition(";")[0]
    folder = tasks[0].recipe.output_dir
    print(f"job {job}: {folder}/slurm-{job}{f'_{options.numbers[0]}' if options.array else ''}.log")
    print(f"to save and end it: touch {folder}/stop; to drop it: scancel {job}", flush=True)
    _warn(too_large)


def _warn(too_large: str | None) -> None:
    """Say last what must not be missed."""
    if too_large:
        print(f"warning: {too_large}", file=sys.stderr, flush=True)


def _different(tasks: list[Task]) -> Iterator[Task]:
    """The tasks that may differ in memory: those of an array often differ in their seed alone."""
    seen = set()
    for task in tasks:
        same = task.recipe.model_copy(update={"seed": 0, "output_dir": ""}).model_dump_json()
        if same not in seen:
            seen.add(same)
            yield task


def memory_fault(options: argparse.Namespace, config: dict[str, Any], recipe: Recipe) -> str | None:
    """Return what doesn't fit by the plan, and what would; None where the job fits, or where that can't be known."""
    from train.preflight.plan.job_memory import gpus_of, memory_warning, shape_in_plan, strategy_of
    from train.preflight.plan.plan import parse_cluster

    gpus, strategy = gpus_of(options.gpu_names, options.gpus), strategy_of(config, recipe)
    shape = shape_in_plan(recipe) if gpus and strategy else None
    if gpus is None or strategy is None or shape is None:
        return None
    return memory_warning(recipe, shape, parse_cluster(gpus, options.nodes), strategy, str(options.config))


def run_check(options: argparse.Namespace, task: Task) -> int:
    """train/sft.py --check, with the plan where the GPUs are known; its exit code.

    The report goes to standard error, as --print may have the other.
    """
    from train.preflight.plan.job_memory import gpus_of, shape_in_plan

    gpus = gpus_of(options.gpu_names, options.gpus)
    anyway = [word for key in options.resume_anyway for word in ("--resume-anyway", key)]
    command = [sys.executable, str(ROOT / "train" / "sft.py"), "--recipe", str(options.recipe), *anyway, "--check"]
    command += ["--gpus", gpus, "--nodes", str(options.nodes)] if gpus and shape_in_plan(task.recipe) else []
    return subprocess.run([*command, *task.overrides], stdout=sys.stderr, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    options = parse(arguments)
    return run_command(lambda: submit(options), "stopped; squeue shows whether a job was submitted")


if __name__ == "__main__":
    sys.exit(main())
