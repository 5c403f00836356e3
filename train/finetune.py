"""One training run, from the recipe to the saved model and its report."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from train.data.chat.assistant_spans import SpanFinder
from train.data.chat.template import without_generation_marks
from train.data.prepare import prepare
from train.errors import USER_FIXABLE_ERRNOS, UserError
from train.loop.arguments import training_arguments
from train.loop.checkpoint.fingerprint import data_fingerprint, samples_fingerprint
from train.loop.checkpoint.manifest import Checkpoint
from train.loop.checkpoint.resume import (
    check_distribution,
    get_run_date,
    keep_sequences_per_step,
    refuse_changes,
)
from train.loop.checkpoint.resumed_settings import ResumedSettings
from train.loop.checkpoint.trainer_state import optimizer_distribution
from train.loop.finished_run import inputs_fingerprint
from train.loop.fsdp import check_in_force
from train.loop.master_weights import Launch, master_weights_error, read_launch
from train.loop.metrics_log import StepLog
from train.loop.output_dir import claim_output_dir, lock_output_dir
from train.loop.preemption import Preemption
from train.loop.preference.reward import RewardTrainer
from train.loop.preference.trainer import PreferenceTrainer
from train.loop.report import write_report
from train.loop.run_outcome import print_resume_hint, record_run_outcome
from train.loop.side_files import side_file_errors
from train.loop.tracking import open_trackers
from train.loop.trainer import JanusTrainer
from train.model.cpu_memory import keep_freed_memory
from train.model.float8 import check_float8_start
from train.model.inference import set_stop_tokens
from train.model.load import load_model
from train.model.tokenizer import check_vocabulary, load_chat_tokenizer
from train.preflight.model_checks import examine_model
from train.preflight.start_screen import start_screen
from train.ranks import is_first_rank, world_size
from train.recipe import Recipe
from train.recipe.schedule import compute_schedule, schedule_error, sharing_error
from train.samples.rows import describe_samples, load_sample_rows
from train.system_gain.validation_rows import describe_gain, gain_metric_error, load_gain_rows


def finetune(recipe: Recipe, checkpoint: Checkpoint | None = None, resume_anyway: Sequence[str] = ()) -> None:
    """Train the model of a recipe, from its beginning or from `checkpoint`, and save it with a report.

    `resume_anyway`: keys of the recipe that may have changed since the checkpoint.
    Raises UserError for errors that the user can fix, almost all of them before the weights are loaded.
    """
    # Check model, settings and template before the data is prepared.
    checked = examine_model(recipe)
    launch = read_launch(recipe.training, os.environ) or Launch()
    _refuse([sharing_error(recipe, world_size()), master_weights_error(recipe, checked.dtype, launch)])
    if checkpoint:
        ResumedSettings(checkpoint, recipe).refuse_under_deepspeed(checkpoint, world_size())
    tokenizer, template, _ = load_chat_tokenizer(recipe.model, recipe.chat, get_run_date(checkpoint))
    check_vocabulary(tokenizer, recipe.model, checked.embeddings)
    check_float8_start(recipe)

    output_dir = Path(recipe.output_dir)
    with _claimed_output_dir(recipe, checkpoint) as preemption:
        # Load the data.
        if checkpoint:
            recipe = keep_sequences_per_step(recipe, checkpoint, resume_anyway, world_size())
        _refuse(side_file_errors(recipe, tokenizer))
        data = prepare(recipe, tokenizer)
        facts = data_fingerprint(data, tokenizer) | samples_fingerprint(recipe)
        if checkpoint:
            facts_before = {key: value for key, value in checkpoint.manifest["run"].items() if key.startswith("made.")}
            refuse_changes(checkpoint, facts_before, facts, resume_anyway)
        gain = load_gain_rows(recipe, data, tokenizer)
        samples = load_sample_rows(recipe, tokenizer)
        tokens_per_sequence = data.train.stats.tokens_per_sequence
        steps = compute_schedule(
            recipe.training, len(data.train.dataset), tokens_per_sequence, world_size(), recipe.model.sequence_parallel
        )
        _refuse([gain_metric_error(recipe, gain) or schedule_error(recipe.training, steps)])

        # Set up the trainer; under ZeRO-3 its arguments must exist before the model is loaded.
        stop_tokens = SpanFinder(tokenizer).stop_tokens
        described = checked.described(recipe)
        arguments = training_arguments(described, stop_tokens)
        if arguments.use_cpu:
            keep_freed_memory()
        if checkpoint:
            check_distribution(checkpoint, optimizer_distribution(arguments))
        tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
        step_log = StepLog(recipe.output_dir)
        with open_trackers(recipe, checkpoint.manifest["wandb_run"] if checkpoint else None):
            _print(f"loading {recipe.model.name_or_path}")
            model = load_model(recipe)
            set_stop_tokens(model, tokenizer, stop_tokens)
            trainer = choose_trainer(recipe)(
                recipe, arguments, model, tokenizer, data, [step_log],
                preemption=preemption, gain=gain, samples=samples, about=facts,
            )  # fmt: skip
            check_in_force(arguments, trainer.accelerator)
            screen = start_screen(
                described, template, data, trainer.model, arguments, describe_gain(gain),
                describe_samples(recipe, samples), model_notes=checked.notes, width=Console().width,
            )  # fmt: skip
            _print(screen)

            # Train.
            if checkpoint:
                _print(f"resuming from {checkpoint.folder}")
            started = time.monotonic()
            with step_log:
                trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
                if preemption.reason:
                    print_resume_hint(output_dir)
                    return

                # Save the model before anything else that could fail, evaluate and report.
                trainer.save_model(recipe.output_dir)
                if data.validation and arguments.eval_strategy == "no":
                    _print(f"the model is in {recipe.output_dir}; evaluating it")
                    trainer.evaluate()
            if is_first_rank():
                reported = write_report(
                    output_dir, screen, time.monotonic() - started, data.train.dataset.rows_by_source
                )
                _print(f"the model {'and report.md are' if reported else 'is'} in {recipe.output_dir}")


def choose_trainer(recipe: Recipe) -> type[JanusTrainer]:
    """Return the trainer of rows, of pairs, or of a reward model."""
    if recipe.preference is None:
        return JanusTrainer
    return RewardTrainer if recipe.trains_reward_model else PreferenceTrainer


@contextmanager
def _claimed_output_dir(recipe: Recipe, checkpoint: Checkpoint | None) -> Iterator[Preemption]:
    """Lock output_dir for this run, watch for requests to stop, and record the outcome of the run."""
    lock = lock_output_dir(recipe.output_dir)
    claim_output_dir(recipe)
    preemption = Preemption(recipe.output_dir, recipe.save, checkpoint.step if checkpoint else 0)
    run = inputs_fingerprint(recipe) if is_first_rank() else {}
    outcome = record_run_outcome(recipe.output_dir, preemption, USER_FIXABLE_ERRNOS, run)
    with preemption.watching(), outcome, lock or nullcontext():
        yield preemption


def _refuse(errors: Iterable[str | None]) -> None:
    if texts := [error for error in errors if error]:
        raise UserError(" ".join(texts))


def _print(line: str) -> None:
    if is_first_rank():
        print(line, flush=True)
