"""Optimizer steps of a run: number, sequences per step, and when the run evaluates and saves.

`--check`, the start screen, the plan and the checkpoints share these numbers; the tests compare them with those of
transformers' Trainer.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from train.formatting import format_count
from train.recipe.lr_schedules import WITHOUT_WARMUP, decay_error
from train.recipe.schema import Recipe
from train.recipe.sft_config import with_defaults

BATCH_KEYS = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Keys that, with the number of processes, make up one optimizer step."""


@dataclass(frozen=True)
class Cadence:
    """Frequency of evaluation or saving: `no`, once an `epoch`, every `steps` optimizer steps, or if `best`."""

    strategy: str
    steps: int | None = None


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a complete run on `processes` processes.

    `sequences_per_step` counts all processes and accumulation steps, and is at most the sequences of an epoch. The last
    step of an epoch may have fewer. `sequence_parallel`: processes that share each sequence.
    """

    processes: int
    sequence_parallel: int
    sequences_per_step: int
    tokens_per_step: float
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup_steps: int
    evaluation: Cadence
    saving: Cadence

    @property
    def sharing(self) -> str:
        """Return the continuation of a number of processes: empty, or how many share a sequence."""
        return f", {self.sequence_parallel:,} for each sequence" if self.sequence_parallel > 1 else ""


def compute_schedule(
    training: Mapping[str, Any],
    sequences: int,
    tokens_per_sequence: float,
    processes: int,
    sequence_parallel: int = 1,
) -> Schedule:
    """Return the steps of a run as transformers counts them.

    SFTConfig has the same numbers, but creating one imports TRL and starts the process group.

    Args:
        training: section `training` of the recipe; TRL's defaults are filled in.
        sequences: sequences per epoch.
        tokens_per_sequence: mean tokens per sequence.
        processes: processes that the launcher starts (WORLD_SIZE).
        sequence_parallel: processes that share each sequence.
    """
    settings = with_defaults(training)
    accumulation = settings["gradient_accumulation_steps"]
    batch = settings["per_device_train_batch_size"] * data_parallel(processes, sequence_parallel)
    batches = sequences // batch if settings["dataloader_drop_last"] else -(-sequences // batch)
    steps_per_epoch = max(-(-batches // accumulation), 1)  # a last, smaller step ends each epoch
    epochs = settings["num_train_epochs"]
    steps = settings["max_steps"] if settings["max_steps"] > 0 else math.ceil(epochs * steps_per_epoch)
    per_step = min(batch * accumulation, sequences)

    def cadence(strategy: str, interval: float) -> Cadence:
        return Cadence(strategy, absolute_steps(interval, steps) if strategy == "steps" else None)

    return Schedule(
        processes=processes,
        sequence_parallel=sequence_parallel,
        sequences_per_step=per_step,
        tokens_per_step=tokens_per_sequence * per_step,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch if settings["max_steps"] > 0 else epochs,
        warmup_steps=absolute_steps(settings["warmup_steps"], steps),
        evaluation=cadence(settings["eval_strategy"], settings["eval_steps"] or settings["logging_steps"]),
        saving=cadence(settings["save_strategy"], settings["save_steps"]),
    )


def absolute_steps(count: float, steps: int) -> int:
    """Return a number of steps; below 1, `count` is a share of all `steps`."""
    return math.ceil(steps * count) if count < 1 else int(count)


def data_parallel(processes: int, sequence_parallel: int) -> int:
    """Return the number of processes, or groups of processes, that train sequences of their own; at least 1."""
    return max(processes // sequence_parallel, 1)


def sharing_error(recipe: Recipe, processes: int) -> str | None:
    """Return an error if `processes` can't be divided into groups that share a sequence; else None."""
    size = recipe.model.sequence_parallel
    if processes % size == 0:
        return None
    return (
        f"model.sequence_parallel: {size} does not divide the {format_count(processes, 'process')} of the launch. "
        f"Start a multiple of {size} with --num_processes, or write a divisor."
    )


def sequences_per_step(recipe: Recipe, processes: int, *, evaluation: bool = False) -> int:
    """Return the sequences of all processes in one optimizer step (or in one batch of an evaluation)."""
    settings = with_defaults(recipe.training)
    groups = data_parallel(processes, recipe.model.sequence_parallel)
    if evaluation:
        return int(settings["per_device_eval_batch_size"] * groups)
    return int(settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * groups)


def schedule_error(training: Mapping[str, Any], schedule: Schedule) -> str | None:
    """Return an error where the learning rate schedule needs more steps than the run has."""
    return decay_error(with_defaults(training), schedule.steps, schedule.warmup_steps)


def schedule_warnings(training: Mapping[str, Any], schedule: Schedule, sequences: int) -> Iterator[str]:
    """Yield warnings about settings without effect in a run this short; `sequences`: sequences per epoch."""
    settings = with_defaults(training)
    run = f"and the run has {format_count(schedule.steps, 'step')}"
    kind = settings["lr_scheduler_type"]
    if schedule.warmup_steps and kind in WITHOUT_WARMUP:
        remedy = "Write `training.lr_scheduler_type: constant_with_warmup`, or remove training.warmup_steps"
        yield f"There is no warm-up: training.lr_scheduler_type: {kind} has none. {remedy}"
    elif schedule.warmup_steps >= schedule.steps:
        yield (
            f"All of {format_count(schedule.steps, 'step', 'is', 'are')} warm-up (training.warmup_steps: "
            f"{schedule.warmup_steps:,}): the learning rate never reaches its peak"
        )
    if settings["learning_rate"] == 0:
        yield "Nothing is trained: training.learning_rate is 0, so no weight changes"
    evaluation = schedule.evaluation
    last = schedule.steps if evaluation.strategy == "steps" else schedule.epochs
    if evaluation.steps and evaluation.steps > schedule.steps:
        yield f"Nothing is evaluated before the end: training.eval_steps is {evaluation.steps:,}, {run}"
    elif evaluation.strategy != "no" and settings["eval_delay"] > last:
        yield f"Nothing is evaluated: training.eval_delay is {settings['eval_delay']:g}, {run}"
    if "save_steps" in training and schedule.saving.steps and schedule.saving.steps > schedule.steps:
        yield f"No checkpoint is saved before the end: training.save_steps is {schedule.saving.steps:,}, {run}"
    if (
        "logging_steps" in training
        and settings["logging_strategy"] == "steps"
        and settings["logging_steps"] > schedule.steps
    ):
        yield f"No loss is logged before the end: training.logging_steps is {settings['logging_steps']:g}, {run}"
    groups = data_parallel(schedule.processes, schedule.sequence_parallel)
    batch = settings["per_device_train_batch_size"] * groups
    step = batch * settings["gradient_accumulation_steps"]
    if 0 < sequences < step:
        yield (
            f"A step takes {format_count(step, 'sequence')}, and an epoch has {sequences:,}: each step is a complete "
            "epoch. Lower training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
        if groups > 1 and sequences < batch:
            yield (
                f"There are fewer sequences than the {schedule.processes:,} processes take at once: some processes "
                "train the same sequences as others"
            )
