"""Supervised fine-tuning from a recipe.

    accelerate launch train/sft.py --recipe recipes/smollm2-135m/sft/quickstart.yaml [key=value ...]

`key=value` overrides the recipe by dotted key: training.learning_rate=1e-5. `--check` reports what would be trained
and trains nothing. Exit codes: 0 done or ready; 2 there is something in the recipe, the data or the machine to mend
(one `error:` says what); 1 anything else.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from train.errors import USER_FIXABLE_ERRNOS, CommandLine, UserError
from train.json_report import discard_earlier
from train.launched import alone_by_mistake
from train.loop.noise import leave_out_unhelpful_warnings
from train.progress import is_first_rank
from train.recipe import Recipe, load_recipe


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path, metavar="FILE", help="what to train, as YAML")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto (default): go on from the newest complete checkpoint in output_dir, if there is one",
    )
    parser.add_argument(
        "--resume-anyway",
        action="append",
        default=[],
        metavar="KEY",
        help="go on though this key of the recipe is not what it was; may be given again",
    )
    parser.add_argument("--check", action="store_true", help="report on model, template and data; train nothing")
    parser.add_argument("--json", metavar="FILE", help="with --check: write the report to FILE too, as JSON")
    parser.add_argument("--gpus", metavar="8x80GB", help="with --check: plan memory and time on such GPUs in each node")
    parser.add_argument("--nodes", type=int, metavar="N", help="with --gpus: how many nodes (default 1)")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="with --gpus: share of the GPUs' peak FLOP/s reached (default 0.4)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the recipe by dotted key")
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
    # Heavy imports wait until the recipe is known to be right.
    from train.data.chat_template import use_template, without_generation_marks
    from train.data.gain_rows import describe_gain, gain_refusal, gain_rows
    from train.data.prepare import prepare
    from train.data.spans import Spans
    from train.data.system_role import settle
    from train.loop.checkpoint import (
        check_distribution,
        find_checkpoint,
        processes_now,
        refuse_changes,
        with_same_steps,
    )
    from train.model.float8 import check_start
    from train.model.load import check_fits, load_model, load_tokenizer
    from train.plan import parse_cluster
    from train.preflight import check, screen

    cluster = parse_cluster(options.gpus, options.nodes, options.mfu) if options.gpus else None
    checkpoint = find_checkpoint(options.resume, recipe, options.resume_anyway)
    tokenizer = load_tokenizer(recipe.model)
    check_fits(recipe, tokenizer)
    template = use_template(tokenizer, recipe.chat.template)
    before = settle(tokenizer, recipe.chat.system_role, recipe.chat.default_system)
    if options.check:
        about = {"checkpoint": checkpoint.folder if checkpoint else None, "cluster": cluster, "json_file": options.json}
        check(recipe, tokenizer, template, before, **about)
        return
    check_start(recipe)

    # TRL, which a check does without, takes seconds to import.
    from train.loop.arguments import training_arguments
    from train.loop.preemption import Preemption, telling_outcome
    from train.loop.report import claim_output_dir, say_where_it_goes_on, write_report
    from train.loop.run_state import facts_of_data, sharding
    from train.loop.saving import keep_others_out
    from train.loop.side_files import side_file_faults
    from train.loop.tracking import StepLog, tracked
    from train.loop.trainer import JanusTrainer
    from train.model.generate import stop_at

    lock = keep_others_out(recipe.output_dir)  # as long as this function runs
    output_dir = claim_output_dir(recipe)
    preemption = Preemption(recipe.output_dir, recipe.save, checkpoint.step if checkpoint else 0)
    telling = telling_outcome(recipe.output_dir, preemption, USER_FIXABLE_ERRNOS)
    with telling, preemption.watching(), lock or nullcontext():
        if checkpoint:
            recipe = with_same_steps(recipe, checkpoint, options.resume_anyway, processes_now())
        if faults := list(side_file_faults(recipe, tokenizer)):
            raise UserError(" ".join(faults))
        data = prepare(recipe, tokenizer)
        about = facts_of_data(data, tokenizer.chat_template)
        if checkpoint:
            made = {key: value for key, value in checkpoint.manifest["run"].items() if key in about}
            refuse_changes(checkpoint, made, about, options.resume_anyway)
        variants = gain_rows(recipe, data, tokenizer)
        if fault := gain_refusal(recipe, variants):
            raise UserError(fault)
        stop_tokens = Spans(tokenizer).stop_tokens
        arguments = training_arguments(recipe, stop_tokens)
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
            overview = screen(recipe, template, data, trainer.model, arguments, describe_gain(variants))
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
    leave_out_unhelpful_warnings()
    options = parse(arguments)
    if options.check and not is_first_rank():
        return 0  # a report needs one process, however many the launcher starts
    if mistake := alone_by_mistake(os.environ):
        print(f"warning: {mistake}", file=sys.stderr, flush=True)
    try:
        if options.json is not None:
            options.json = discard_earlier(options.json)
        train(load_recipe(options.recipe, options.overrides), options)
    except UserError as fault:
        if is_first_rank():
            print(f"error: {fault}", file=sys.stderr, flush=True)
        if "torch" in sys.modules:  # else the fault was found before anything was loaded
            from train.loop.leaving import leave_with_the_others

            leave_with_the_others()
        return 2
    except BrokenPipeError:
        if not options.check:
            raise
        return 1  # who read the report has left, and knows it
    except OSError as fault:
        if fault.errno not in USER_FIXABLE_ERRNOS:
            raise
        print(
            f"error: {fault.filename or 'a file'}: {fault.strerror}. Mend it and start again.",
            file=sys.stderr,
            flush=True,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
