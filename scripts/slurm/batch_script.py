"""Batch script of a Slurm job: directives and variables of one job, followed by job.sh, which all jobs share."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
CPUS_PER_GPU = 8


@dataclass(frozen=True)
class Task:
    """A task of an array, or the complete job, with its resolved recipe."""

    overrides: list[str]
    recipe: Recipe


def resume_options(keys: Sequence[str]) -> list[str]:
    """Return the options of the command that trains for `--resume-anyway` keys."""
    return [word for key in keys for word in ("--resume-anyway", key)]


def render_script(options: argparse.Namespace, config: dict[str, Any], task: Task) -> str:
    """Return the batch script.

    Args:
        options: command line of scripts/submit.py.
        config: accelerate's configuration.
        task: the job, or the first task of an array.
    """
    join = shlex.join
    several_nodes = options.nodes > 1
    folders = [value for key, _, value in (text.partition("=") for text in options.overrides) if key == "output_dir"]
    output_dir = folders[-1] if options.array and folders else task.recipe.output_dir
    log_folder = output_dir if options.array else output_dir.replace("%", "%%")  # Slurm expands % in file names
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
        "output": f"{log_folder}/slurm-{'%A_%a' if options.array else '%j'}.log",
        "chdir": Path.cwd(),
        "export": "ALL",
    }
    directives = [f"--{name}={shlex.quote(str(value))}" for name, value in slurm.items() if value is not None]
    launch = ["--config_file", str(options.config), "--num_machines", str(options.nodes)]
    launch += ["--num_processes", str(options.nodes * max(options.gpus, 1))]
    if several_nodes and config.get("distributed_type") == "DEEPSPEED":
        launch += ["--deepspeed_multinode_launcher", "standard"]
    nodes = f"{options.nodes} {'nodes' if several_nodes else 'node'}"
    lines = [
        "#!/bin/bash",
        f"# {options.recipe} on {nodes}, {options.gpus} GPUs each. Written by scripts/submit.py of janus-sft.",
        f"# To submit it by hand: mkdir -p {shlex.quote(output_dir)} && sbatch THIS_FILE",
        "# --export=ALL passes on the environment of the submitting shell, keys for wandb and the hub included.",
        "# None of it is written here or printed.",
        *(f"#SBATCH {directive}" for directive in (*directives, "--requeue", *map(_quote_value, options.sbatch))),
        "",
        *options.setup,
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"checkout={shlex.quote(str(ROOT))}",
        f"output_dir={shlex.quote(output_dir)}",
        f"max_restarts={options.max_restarts}",
        f"command={task.recipe.command}",
        f"recipe=({join(['--recipe', str(options.recipe), *options.overrides])})",
        f"training=({join(resume_options(options.resume_anyway))})",
        f"launch=({join(launch)})",
        f"gpus={options.gpus}",
    ]
    if options.array:
        lines += [
            "# %a is the number of the task",
            "output_dir=${output_dir//%a/$SLURM_ARRAY_TASK_ID}",
            'recipe=("${recipe[@]//%a/$SLURM_ARRAY_TASK_ID}")',
        ]
    return "\n".join(lines) + "\n" + (ROOT / "scripts" / "slurm" / "job.sh").read_text(encoding="utf-8")


def _quote_value(option: str) -> str:
    """Quote the value of an option of sbatch, such as `--comment=a b`."""
    name, equals, value = option.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else option
