"""Checks before a job is submitted: everything that a login node can find out without a GPU."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from slurm.batch_script import ROOT, Task, resume_options
from train.errors import UserError
from train.preflight.missing_files import check_files_exist
from train.ranks import hpz_error, parallelism_error
from train.recipe import Recipe


def check_launch(options: argparse.Namespace) -> dict[str, Any]:
    """Return accelerate's configuration. Raises UserError if it can't start these processes from this folder."""
    try:
        config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config: {options.config} can't be read from {Path.cwd()}: {error}") from error
    processes = options.nodes * max(options.gpus, 1)
    if str(config.get("distributed_type", "NO")) == "NO" and processes > 1:
        raise UserError(
            f"--config: {options.config} is for one process (distributed_type: NO), and the job has {processes}. Use "
            "a file of accelerate_configs for several processes."
        )
    deepspeed = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if deepspeed and not Path(deepspeed).is_file():
        raise UserError(
            f"--config: {options.config} names {deepspeed}, which does not exist in {Path.cwd()}. Submit from the "
            f"folder that contains it ({ROOT})."
        )
    if mismatch := _node_sharding_error(options, config):
        raise UserError(f"--config: {options.config}: {mismatch}")
    return dict(config)


def _node_sharding_error(options: argparse.Namespace, config: dict[str, Any]) -> str | None:
    """Return an error if the configuration divides weights between nodes as this job has none; else None."""
    of_a_node = max(options.gpus, 1)
    environment = {"WORLD_SIZE": str(options.nodes * of_a_node), "LOCAL_WORLD_SIZE": str(of_a_node)}
    if sizes := config.get("parallelism_config"):
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        environment |= {key.upper(): str(size) for key, size in sizes.items()}
    from train.loop.master_weights import read_launch_configuration  # imports torch

    deepspeed = read_launch_configuration({}, config).deepspeed or {}
    hpz = (deepspeed.get("zero_optimization") or {}).get("zero_hpz_partition_size") or 1
    if options.nodes == 1 and hpz > 1:
        return "it keeps a second copy of the weights on each node (hpZ), which is for several. Use zero3.yaml."
    return parallelism_error(environment) or hpz_error(deepspeed, environment)


def check_task(options: argparse.Namespace, config: dict[str, Any], task: Task) -> None:
    """Check the time limit and the recipe of a task; its data is not read. Raises UserError."""
    if options.seconds <= (margin := task.recipe.save.seconds_before_end):
        raise UserError(
            f"--time: {options.time} is {options.seconds:,} s, and save.seconds_before_end is {margin}: the job would "
            "stop after its first step. Request more time, or lower save.seconds_before_end."
        )
    with redirect_stdout(sys.stderr):  # standard output is for the script
        _check_recipe(task.recipe, config, options.nodes * max(options.gpus, 1), options.resume_anyway)


def _check_recipe(recipe: Recipe, config: dict[str, Any], processes: int, resume_anyway: list[str]) -> None:
    check_files_exist(recipe, packages=False)
    from train.loop.master_weights import master_weights_error, read_launch_configuration
    from train.loop.sharding import sharding_error
    from train.model.folder import check_model_folder
    from train.model.tokenizer import check_vocabulary, load_chat_tokenizer
    from train.preflight.checks import find_run_errors
    from train.preflight.model_checks import examine_model

    if errors := find_run_errors(recipe, 0, processes):
        raise UserError(" ".join(errors))
    _check_checkpoint(recipe, resume_anyway)
    check_model_folder(recipe.model)
    checked = examine_model(recipe, elsewhere=True)
    for note in checked.notes:
        print(f"note: {note}", file=sys.stderr)
    launch = read_launch_configuration(recipe.training, config)
    if error := master_weights_error(recipe, checked.dtype, launch) or sharding_error(recipe, launch):
        raise UserError(error)
    check_vocabulary(load_chat_tokenizer(recipe.model, recipe.chat).tokenizer, recipe.model, checked.embeddings)


def _check_checkpoint(recipe: Recipe, resume_anyway: list[str]) -> None:
    """Raise UserError if the newest checkpoint belongs to another run. The job verifies its files."""
    from train.loop.checkpoint.fingerprint import run_fingerprint
    from train.loop.checkpoint.manifest import COMPLETE, Checkpoint, list_checkpoints
    from train.loop.checkpoint.resume import refuse_changes

    for folder in list_checkpoints(recipe.output_dir, recipe.save.mirror_dir):
        try:
            manifest = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
            before = {key: value for key, value in manifest["run"].items() if not key.startswith("made.")}
        except (OSError, ValueError, KeyError):
            continue  # incomplete: the job skips it too
        refuse_changes(Checkpoint(folder, manifest), before, run_fingerprint(recipe), resume_anyway)
        return


def memory_warning(options: argparse.Namespace, config: dict[str, Any], tasks: list[Task]) -> str | None:
    """Return a warning for the first task that doesn't fit in memory according to the plan; None if all fit.

    The plan is advice: a task without it (unknown GPUs or way to run, a model that can't be planned) counts as fitting.
    """
    from train.preflight.plan import job_memory
    from train.preflight.plan.cluster import parse_cluster

    gpus = job_memory.parse_gpu_names(options.gpu_names, options.gpus)
    for recipe in _distinct_recipes(tasks):
        strategy = job_memory.read_strategy(config, recipe)
        if gpus is None or strategy is None:
            continue
        try:
            candidates = job_memory.open_candidates(recipe)
            cluster = parse_cluster(gpus, options.nodes)
            warning = job_memory.memory_warning(candidates, cluster, strategy, str(options.config))
        except UserError:
            continue
        if warning:
            return warning
    return None


def _distinct_recipes(tasks: list[Task]) -> Iterator[Recipe]:
    """Yield the recipes that may differ in memory: tasks of an array often differ only in their seed."""
    seen = set()
    for task in tasks:
        key = task.recipe.model_copy(update={"seed": 0, "output_dir": ""}).model_dump_json()
        if key not in seen:
            seen.add(key)
            yield task.recipe


def run_data_check(options: argparse.Namespace, task: Task) -> int:
    """Run the recipe's command with --check, with a plan where the GPUs are known, and return its exit code.

    The report goes to standard error, because --print uses standard output.
    """
    from train.preflight.plan.job_memory import can_be_planned, parse_gpu_names

    gpus = parse_gpu_names(options.gpu_names, options.gpus)
    command = [sys.executable, str(ROOT / task.recipe.command), "--recipe", str(options.recipe), "--check"]
    command += ["--elsewhere", *resume_options(options.resume_anyway)]
    command += ["--gpus", gpus, "--nodes", str(options.nodes)] if gpus and can_be_planned(task.recipe) else []
    return subprocess.run([*command, *task.overrides], stdout=sys.stderr, check=False).returncode
