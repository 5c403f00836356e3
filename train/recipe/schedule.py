"""Optimizer steps of a run: how many there are, of how many sequences each, and when the run evaluates and saves.

The same numbers for `--check`, the start screen and the plan; the tests hold them against transformers' Trainer.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from train.formatting import format_count
from train.recipe.lr_schedules import WITHOUT_WARMUP, too_long
from train.recipe.schema import Recipe
from train.recipe.sft_config import training_fields, with_defaults


@dataclass(frozen=True)
class Rhythm:
    """Frequency of something: never (`no`), once an epoch, every so many optimizer `steps`, or where `best`."""

    strategy: str
    steps: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of the whole run, for as many processes as the launcher starts (WORLD_SIZE, or else 1).

    `sequences_per_step`: of all processes and accumulation steps, at most those of an epoch, whose last step may have
    fewer.
    """

    processes: int
    sequences_per_step: int
    tokens_per_step: float
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup_steps: int
    evaluation: Rhythm
    saving: Rhythm


def compute_schedule(
    training: Mapping[str, Any], sequences: int, tokens_per_sequence: float, processes: int
) -> Schedule:
    """Return the steps of a run as transformers counts them, from the recipe's `training` and TRL's defaults.

    `sequences`: those of an epoch. SFTConfig would tell too, but making one imports TRL and starts the process group.
    """
    settings = with_defaults(training)
    accumulation = settings["gradient_accumulation_steps"]
    batch = settings["per_device_train_batch_size"] * processes
    batches = sequences // batch if settings["dataloader_drop_last"] else -(-sequences // batch)
    steps_per_epoch = max(-(-batches // accumulation), 1)  # a last, smaller step ends each epoch
    epochs = settings["num_train_epochs"]
    steps = settings["max_steps"] if settings["max_steps"] > 0 else math.ceil(epochs * steps_per_epoch)
    together = min(batch * accumulation, sequences)

    def absolute(count: float) -> int:
        return math.ceil(steps * count) if count < 1 else int(count)  # below 1 it is a share of all steps

    def rhythm(strategy: str, every: float) -> Rhythm:
        return Rhythm(strategy, absolute(every) if strategy == "steps" else None)

    return Schedule(
        processes=processes,
        sequences_per_step=together,
        tokens_per_step=tokens_per_sequence * together,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch if settings["max_steps"] > 0 else epochs,
        warmup_steps=absolute(settings["warmup_steps"]),
        evaluation=rhythm(settings["eval_strategy"], settings["eval_steps"] or settings["logging_steps"]),
        saving=rhythm(settings["save_strategy"], settings["save_steps"]),
    )


def schedule_error(training: Mapping[str, Any], steps: Schedule) -> str | None:
    """Return what the learning rate's schedule asks for and this many steps can't give."""
    return too_long(with_defaults(training), steps.steps, steps.warmup_steps)


def schedule_warnings(training: Mapping[str, Any], steps: Schedule, sequences: int) -> Iterator[str]:
    """Yield what a run of so many steps, on so many sequences an epoch, does otherwise than the recipe may mean."""
    settings = with_defaults(training)
    run = f"and the run has {format_count(steps.steps, 'step')}"
    kind = settings["lr_scheduler_type"]
    if steps.warmup_steps and kind in WITHOUT_WARMUP:
        instead = "Write `training.lr_scheduler_type: constant_with_warmup`, or take training.warmup_steps out"
        yield f"There is no warm-up: training.lr_scheduler_type: {kind} has none. {instead}"
    elif steps.warmup_steps >= steps.steps:
        yield (
            f"All of {format_count(steps.steps, 'step', 'is', 'are')} warm-up (training.warmup_steps: "
            f"{steps.warmup_steps:,}): the learning rate never gets to its full height"
        )
    if settings["learning_rate"] == 0:
        yield "Nothing is learnt: training.learning_rate is 0, so no weight changes"
    late = settings["eval_delay"] >= (steps.steps if steps.evaluation.strategy == "steps" else steps.epochs)
    if steps.evaluation.steps and steps.evaluation.steps > steps.steps:
        yield f"Nothing is evaluated: training.eval_steps is {steps.evaluation.steps:,}, {run}"
    elif steps.evaluation.strategy != "no" and settings["eval_delay"] and late:
        yield f"Nothing is evaluated: training.eval_delay is {settings['eval_delay']:g}, {run}"
    if "save_steps" in training and steps.saving.steps and steps.saving.steps > steps.steps:
        yield f"No checkpoint is saved before the end: training.save_steps is {steps.saving.steps:,}, {run}"
    if (
        "logging_steps" in training
        and settings["logging_strategy"] == "steps"
        and settings["logging_steps"] > steps.steps
    ):
        yield f"No loss is logged before the end: training.logging_steps is {settings['logging_steps']:g}, {run}"
    batch = settings["per_device_train_batch_size"] * steps.processes
    asked = batch * settings["gradient_accumulation_steps"]
    if 0 < sequences < asked:
        yield (
            f"A step takes {format_count(asked, 'sequence')}, and an epoch has {sequences:,}: each step is a whole epoch. "
            "Lower training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
        if steps.processes > 1 and sequences < batch:
            yield f"Of {steps.processes:,} processes some train what others do, as there are too few sequences for all"


BATCH_KEYS = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""What one step consists of; another split of as many sequences is the same step."""


def sequences_per_step(recipe: Recipe, processes: int) -> int:
    """Rows of all processes and accumulation steps in one optimizer step."""
    each, accumulated = (
        recipe.training.get(key.partition(".")[2], training_fields()[key.partition(".")[2]].default)
        for key in BATCH_KEYS
    )
    return int(each * accumulated * processes)
