r"""Supervised fine-tuning from a recipe.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        train/sft.py --recipe recipes/smollm2-135m/sft/quickstart.yaml \
        training.learning_rate=1e-5

    python train/sft.py --recipe recipes/smollm2-135m/sft/quickstart.yaml \
        --check

    python train/sft.py --init my.yaml --model MODEL --data rows.jsonl

`key=value` overrides a key of the recipe, by its dotted name. `--check` reports what would be trained and trains
nothing. `--init` writes a recipe to start from. The same command continues an interrupted run from its newest complete
checkpoint.

Exit codes: 0 done, or ready with --check; 2 an error that the user can fix in the recipe, the data or the machine (one
paragraph on standard error); 130 stopped by Ctrl-C; 1 anything else.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from train.cli import CommandLine, exit_with, heavy_imports, print_error, run_command
from train.errors import USER_FIXABLE_ERRNOS, MachineError, UserError
from train.formatting import wrap
from train.loop.checkpoint.resume import find_checkpoint
from train.loop.finished_run import find_finished_run
from train.model.folder import check_model_folder
from train.preflight.json_report import discard_earlier_report
from train.preflight.missing_files import check_files_exist
from train.ranks import is_first_rank, single_process_warning
from train.recipe import load_recipe
from train.storage.local_paths import parse_path_or_id
from train.warning_filters import filter_known_warnings

COMMAND = "train/sft.py"


def parse_options(
    arguments: list[str] | None, command: str = COMMAND, description: str | None = __doc__
) -> argparse.Namespace:
    """Parse the command line. Exits with 2 if it can't be understood.

    `command`, `description`: name and help text of the command, where it is another one with the same options.
    """
    parser = CommandLine(description=description)
    parser.set_defaults(command=command)
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument(
        "--init", type=Path, metavar="FILE", help="write a commented minimal recipe to FILE, and train nothing"
    )
    parser.add_argument("--model", metavar="DIR_OR_ID", help="with --init: the model that will be trained")
    parser.add_argument("--data", metavar="PATH_OR_ID", help="with --init: the rows that it will be trained on")
    parser.add_argument(
        "--resume",
        type=parse_path_or_id,
        default="auto",
        metavar="auto|never|DIR",
        help="auto (default): resume from the newest complete checkpoint in output_dir, if there is one; never: train "
        "from the beginning; DIR: resume from this checkpoint",
    )
    parser.add_argument(
        "--resume-anyway",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although this key of the recipe has changed since the checkpoint; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="report what would be trained, and train nothing")
    parser.add_argument(
        "--json", type=parse_path_or_id, metavar="FILE", help="with --check: also write the report to FILE as JSON"
    )
    parser.add_argument("--gpus", metavar="8x80GB", help="with --check: plan memory and time on these GPUs of one node")
    parser.add_argument("--nodes", type=int, metavar="N", help="with --gpus: number of nodes (default 1)")
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="with --gpus: share of the peak FLOP/s that training reaches (default 0.4)",
    )
    about_elsewhere = (
        "with --check: another machine trains; packages and a GPU that this one lacks are notes (as by --gpus)"
    )
    parser.add_argument("--elsewhere", action="store_true", help=about_elsewhere)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.init is None and options.recipe is None:
        parser.error("the following arguments are required: --recipe")
    if options.init is not None and command != COMMAND:
        parser.error(f"--init writes a recipe for {COMMAND}: write one with it, and add the section `preference`")
    if options.init is not None and (options.recipe is not None or options.check or options.overrides):
        parser.error("--init writes a recipe: give it without --recipe, --check and overrides")
    if options.init is None and (options.model or options.data):
        parser.error("--model and --data belong to --init; a recipe names them as model.name_or_path and data.sources")
    if options.json is not None and not options.check:
        parser.error("--json writes the report of --check: give both")
    if options.gpus and not options.check:
        parser.error("--gpus is an option of --check: give both")
    if options.elsewhere and not options.check:
        parser.error("--elsewhere is an option of --check: give both")
    options.elsewhere |= bool(options.gpus)
    if not options.gpus and (options.nodes is not None or options.mfu is not None):
        parser.error("--nodes and --mfu need --gpus, such as --gpus 8x80GB")
    return options


def run(options: argparse.Namespace) -> None:
    """Train the recipe, report on it (--check) or write one (--init). Raises UserError for errors of the user."""
    if options.init is not None:
        from train.preflight.starter_recipe import write_starter_recipe

        notes = write_starter_recipe(options.init, options.model, options.data)
        print(f"{options.init} is written. Check it: python train/sft.py --recipe {options.init} --check")
        for note in notes:
            print(f"note: {note}")
        return
    json_file = discard_earlier_report(options.json) if options.json is not None else None
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.command != options.command:
        section = "has no section `preference`" if recipe.preference is None else "trains on pairs (`preference`)"
        raise UserError(f"{options.recipe}: this recipe {section}. Run {recipe.command}.")
    check_files_exist(recipe, packages=not options.elsewhere)
    width = Console(file=sys.stdout).width
    finished, difference = find_finished_run(recipe) if options.resume == "auto" else (None, None)
    if difference and is_first_rank():
        print(wrap(difference, width), flush=True)
    if finished and not options.check:
        if is_first_rank():
            print(finished.message(width), flush=True)
        return
    check_model_folder(recipe.model, weights=not options.gpus)
    checkpoint = find_checkpoint(options.resume, recipe, options.resume_anyway, jointly=not options.check)

    # Heavy imports wait until the recipe is valid and everything that it names exists.
    if options.check:
        with heavy_imports():
            from train.preflight.check import check

        cluster = None
        if options.gpus:
            from train.preflight.plan.cluster import parse_cluster

            cluster = parse_cluster(options.gpus, options.nodes, options.mfu)
        summary = finished.summary if finished else None
        check(recipe, checkpoint, finished=summary, cluster=cluster, elsewhere=options.elsewhere, json_file=json_file)
    else:
        with heavy_imports():
            from train.finetune import finetune

        finetune(recipe, checkpoint, options.resume_anyway)


def _check_for_this_machine(options: argparse.Namespace) -> None:
    try:
        run(options)
    except MachineError as error:
        raise UserError(f"{error} For a run on another machine: --check --elsewhere, or --gpus.") from error


def main(arguments: list[str] | None = None, command: str = COMMAND, description: str | None = __doc__) -> int:
    """Run the command; return its exit code. Arguments: as of `parse_options`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    options = parse_options(arguments, command, description)
    if options.check and not is_first_rank():
        return 0  # a report needs one process, however many the launcher starts
    if mistake := single_process_warning(os.environ):
        print(f"warning: {mistake}", file=sys.stderr, flush=True)
    return run_command(
        lambda: _check_for_this_machine(options) if options.check else run(options),
        "stopped",
        guard_output=options.check,
        on_user_error=report_error,
        user_fixable_errnos=USER_FIXABLE_ERRNOS,
    )


def report_error(error: UserError) -> None:
    """Print the error once, on the first rank, and shut down all ranks together."""
    if is_first_rank():
        print_error(error)
    if "torch" in sys.modules:  # else no process group has been started
        from train.loop.shutdown import shutdown_process_group

        shutdown_process_group()


if __name__ == "__main__":
    exit_with(main)
