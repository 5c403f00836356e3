r"""Supervised fine-tuning from a recipe.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        train/sft.py --recipe recipes/smollm2-135m/sft/quickstart.yaml \
        training.learning_rate=1e-5

    python train/sft.py --recipe recipes/smollm2-135m/sft/quickstart.yaml \
        --check

`key=value` overrides a key of the recipe, by its dotted name. `--check` reports what would be trained and trains
nothing. The same command continues an interrupted run from its newest complete checkpoint.

Exit codes: 0 done, or ready with --check; 2 something in the recipe, the data or the machine has to be changed (one
`error:` says what); 130 stopped by Ctrl-C; 1 anything else.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from train.cli import CommandLine, print_error, run_command
from train.errors import USER_FIXABLE_ERRNOS, UserError
from train.formatting import wrap
from train.model.folder import check_model_folder
from train.preflight.json_report import discard_earlier
from train.preflight.missing_files import refuse_missing
from train.ranks import is_first_rank, single_process_warning
from train.recipe import Recipe, load_recipe
from train.storage.local_paths import parse_path_or_id
from train.warning_filters import filter_known_warnings


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--recipe", required=True, type=Path, metavar="FILE", help="the recipe: a YAML file that says what to train"
    )
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
    parser.add_argument(
        "--check", action="store_true", help="report the model, the template and the data, and train nothing"
    )
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.json is not None and not options.check:
        parser.error("--json writes the report of --check: give both")
    if options.gpus and not options.check:
        parser.error("--gpus is planned for by --check: give both")
    if not options.gpus and (options.nodes is not None or options.mfu is not None):
        parser.error("--nodes and --mfu belong to --gpus: say which GPUs, such as --gpus 8x80GB")
    return options


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    """Prepare, load, train, save; or report, with --check. Raises UserError for all that the user can mend."""
    from train.loop.run_outcome import fingerprint, finished_run

    width = Console(file=sys.stdout).width
    finished, changed = finished_run(recipe) if options.resume == "auto" else (None, None)
    if changed and is_first_rank():
        print(wrap(changed, width), flush=True)
    if finished and not options.check:
        if is_first_rank():
            print(finished.message(width), flush=True)
        return

    check_model_folder(recipe.model, weights=not options.gpus)
    from train.loop.checkpoint.resume import (
        check_distribution,
        date_of_run,
        find_checkpoint,
        refuse_changes,
        with_same_steps,
    )
    from train.ranks import world_size

    checkpoint = find_checkpoint(options.resume, recipe, options.resume_anyway)

    # Heavy imports wait until the recipe is known to be right and what it names to be there.
    from train.data.chat.assistant_spans import Spans
    from train.data.chat.system_role import apply_system_role
    from train.data.chat.template import pin_date, use_template, without_generation_marks
    from train.data.prepare import prepare
    from train.loop.optimizer_test import try_optimizer
    from train.model.float8 import check_start
    from train.model.load import check_fits, load_config, load_model
    from train.model.quantized_weights import with_saved_quantization
    from train.model.tokenizer import load_tokenizer
    from train.preflight.check import check
    from train.preflight.plan.plan import parse_cluster
    from train.preflight.start_screen import screen
    from train.recipe.schedule import compute_schedule, schedule_error
    from train.system_gain.validation_rows import describe_gain, gain_refusal, gain_rows

    cluster = parse_cluster(options.gpus, options.nodes, options.mfu) if options.gpus else None
    tokenizer = load_tokenizer(recipe.model)
    notes = check_fits(recipe, tokenizer)
    try_optimizer(recipe)
    if checkpoint:
        from train.loop.checkpoint.resumed_settings import ResumedSettings  # imports much of transformers

        with_deepspeed = checkpoint.manifest["distribution"].startswith("DeepSpeed")
        ResumedSettings(checkpoint, recipe).refuse(checkpoint, deepspeed=with_deepspeed)
    template = use_template(tokenizer, recipe.chat.template)
    before = apply_system_role(tokenizer, recipe.chat.system_role, recipe.chat.default_system)
    pin_date(tokenizer, date_of_run(checkpoint))
    if options.check:
        about = {"checkpoint": checkpoint.folder if checkpoint else None, "cluster": cluster, "json_file": options.json}
        described = with_saved_quantization(recipe, load_config(recipe.model))
        summary = finished.summary if finished else None
        check(described, tokenizer, template, before, finished=summary, model_notes=notes, **about)
        return
    check_start(recipe)

    # TRL, which a check does without, takes seconds to import.
    from train.loop.arguments import training_arguments
    from train.loop.checkpoint.side_files import side_file_faults
    from train.loop.checkpoint.trainer_state import facts_of_data, sharding
    from train.loop.metrics_log import StepLog, tracked
    from train.loop.output_dir import claim_output_dir, lock_output_dir
    from train.loop.preemption import Preemption
    from train.loop.report import say_where_it_goes_on, write_report
    from train.loop.run_outcome import record_run_outcome
    from train.loop.trainer import JanusTrainer
    from train.model.inference import stop_at

    lock = lock_output_dir(recipe.output_dir)  # as long as this function runs
    output_dir = claim_output_dir(recipe)
    preemption = Preemption(recipe.output_dir, recipe.save, checkpoint.step if checkpoint else 0)
    run = fingerprint(recipe) if is_first_rank() else {}
    telling = record_run_outcome(recipe.output_dir, preemption, USER_FIXABLE_ERRNOS, run)
    with preemption.watching(), telling, lock or nullcontext():
        if checkpoint:
            recipe = with_same_steps(recipe, checkpoint, options.resume_anyway, world_size())
        if faults := list(side_file_faults(recipe, tokenizer)):
            raise UserError(" ".join(faults))
        data = prepare(recipe, tokenizer)
        about = facts_of_data(data, tokenizer)
        if checkpoint:
            made = {key: value for key, value in checkpoint.manifest["run"].items() if key.startswith("made.")}
            refuse_changes(checkpoint, made, about, options.resume_anyway)
        variants = gain_rows(recipe, data, tokenizer)
        account = data.train.account
        steps = compute_schedule(recipe.training, len(data.train.rows), account.tokens_per_sequence, world_size())
        if fault := gain_refusal(recipe, variants) or schedule_error(recipe.training, steps):
            raise UserError(fault)
        stop_tokens = Spans(tokenizer).stop_tokens
        described = with_saved_quantization(recipe, load_config(recipe.model))
        arguments = training_arguments(described, stop_tokens)
        if checkpoint:
            check_distribution(checkpoint, sharding(arguments))
        tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)

        step_log = StepLog(recipe.output_dir)
        with tracked(recipe, checkpoint.manifest["wandb_run"] if checkpoint else None):
            if is_first_rank():
                print(f"loading {recipe.model.name_or_path}", flush=True)
            model = load_model(recipe)
            stop_at(model, tokenizer, stop_tokens)
            trainer = JanusTrainer(
                recipe, arguments, model, tokenizer, data, [step_log], preemption=preemption, gain=variants, about=about
            )
            gain = describe_gain(variants)
            overview = screen(described, template, data, trainer.model, arguments, gain, model_notes=notes, width=width)
            if is_first_rank():
                print(overview, flush=True)
                if checkpoint:
                    print(f"going on from {checkpoint.folder}", flush=True)
            started = time.monotonic()
            with step_log:
                trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
                if preemption.reason:
                    say_where_it_goes_on(output_dir)
                    return
                trainer.save_model(recipe.output_dir)  # before anything else that could fail
                if data.validation and arguments.eval_strategy == "no":
                    if is_first_rank():
                        print(f"the model is in {recipe.output_dir}; evaluating it", flush=True)
                    trainer.evaluate()
            if is_first_rank():
                written = write_report(output_dir, overview, time.monotonic() - started)
                print(f"the model {'and report.md are' if written else 'is'} in {recipe.output_dir}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    options = parse(arguments)
    if options.check and not is_first_rank():
        return 0  # a report needs one process, however many the launcher starts
    if mistake := single_process_warning(os.environ):
        print(f"warning: {mistake}", file=sys.stderr, flush=True)

    def run() -> None:
        if options.json is not None:
            options.json = discard_earlier(options.json)
        recipe = load_recipe(options.recipe, options.overrides)
        refuse_missing(recipe)
        train(recipe, options)

    return run_command(
        run,
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
    sys.exit(main())
