"""The facts that --check reports: the rows as they would be trained, what became of the others, the steps ahead."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.loss_mask import NOT_TRAINED
from train.data.prepare import Account, Prepared, Row, refusal
from train.data.sources import BadRow
from train.data.survey import Bin, Overlap, Repeats, histogram, quantiles
from train.errors import UserError
from train.model.load import load_config
from train.model.shape import shape_of
from train.plan import Cluster, Plan, plan
from train.recipe import Recipe
from train.training_fields import training_fields


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text of which every token is trained, or none."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One row as the model will see it. The texts of `pieces` in their order are its whole text."""

    place: str
    tokens: int
    trained_tokens: int
    system_message: bool
    pieces: list[Piece]


@dataclass(frozen=True)
class Outcome:
    """Rows that are not trained as they stand, for one reason, with the first three of them.

    `outcome`: refused (the run won't start), left out, dropped or truncated.
    """

    outcome: str
    reason: str
    rows: int
    examples: list[BadRow]


@dataclass(frozen=True)
class PartReport:
    """Training or validation.

    `rows` are those that are trained; `lengths` (tokens, by percent of the rows), `histogram` and `longest_tokens` are
    of all rows before any was cut or dropped. `filling`: tokens of the room in all sequences, 0 to 1, null without
    packing. `duplicates`: rows that repeat another word for word, those that a source's weight repeats aside.
    """

    rows: int
    tokens: int
    trained_tokens: int
    rows_with_system_message: int
    distinct_system_messages: int
    lengths: dict[str, int]
    histogram: list[Bin]
    longest_tokens: int
    longest_place: str
    sequences: int
    filling: float | None
    documents_per_sequence_mean: float
    documents_per_sequence_max: int
    duplicates: Repeats


@dataclass(frozen=True)
class Rhythm:
    """How often something is done: never (`no`), once an epoch, every so many optimizer `steps`, or where `best`."""

    strategy: str
    steps: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of the whole run, for as many processes as the launcher starts (WORLD_SIZE, or else 1)."""

    processes: int
    sequences_per_step: int
    tokens_per_step: float
    steps_per_epoch: int
    steps: int
    epochs: float
    warmup_steps: int
    evaluation: Rhythm
    saving: Rhythm


@dataclass(frozen=True)
class Report:
    """All that --check finds. `--json FILE` writes these fields under their names, and those of the classes above.

    `error` is what has to change and null where `ready`. `resumes_from`: the checkpoint that the run would go on from.
    `validation` is null where the recipe names none, `plan` where no GPUs are named.
    """

    ready: bool
    error: str | None
    warnings: list[str]
    model: str
    dtype: str
    template: str
    probe: list[str]
    max_length: int
    packing: bool
    training: PartReport
    validation: PartReport | None
    outcomes: list[Outcome]
    overlap: Overlap
    schedule: Schedule
    output_dir: str
    resumes_from: str | None
    plan: Plan | None
    examples: list[Example]


def survey(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    template: str,
    probe_lines: Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
    cluster: Cluster | None = None,
) -> Report:
    """The facts of the report. The steps are those on `cluster`, or else of the processes that the launcher starts."""
    account = data.train.account
    error = refusal(data, recipe.data)
    processes = cluster.processes if cluster else int(os.environ.get("WORLD_SIZE", "1"))
    steps = schedule(recipe.training, account.sequences, account.tokens_per_sequence, processes)
    return Report(
        ready=error is None,
        error=error,
        warnings=[*warnings_of(data), *_warnings_of_schedule(steps)],
        model=recipe.model.name_or_path,
        dtype=recipe.model.dtype,
        template=template,
        probe=list(probe_lines),
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        training=_part(account, recipe),
        validation=_part(data.validation.account, recipe) if data.validation else None,
        outcomes=outcomes(data, recipe),
        overlap=data.overlap,
        schedule=steps,
        output_dir=recipe.output_dir,
        resumes_from=str(checkpoint) if checkpoint else None,
        plan=_plan(recipe, account, steps, cluster) if cluster else None,
        examples=[_example(tokenizer, row) for row in account.examples],
    )


def write_json(report: Report, path: Path) -> None:
    """Write the report as JSON. Raises UserError where the file can't be written."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as fault:
        raise UserError(f"--json {path}: {fault.strerror}. Name a file in a folder that can be written.") from fault


def schedule(training: Mapping[str, Any], sequences: int, tokens_per_sequence: float, processes: int) -> Schedule:
    """The steps of a run as transformers counts them, from the recipe's `training` and TRL's defaults.

    SFTConfig would tell too, but making one imports TRL and starts the process group.
    """
    settings = {name: known.default for name, known in training_fields().items()} | dict(training)
    accumulation = settings["gradient_accumulation_steps"]
    per_step = settings["per_device_train_batch_size"] * processes
    batches = sequences // per_step if settings["dataloader_drop_last"] else -(-sequences // per_step)
    steps_per_epoch = max(-(-batches // accumulation), 1)
    epochs = settings["num_train_epochs"]
    steps = settings["max_steps"] if settings["max_steps"] > 0 else math.ceil(epochs * steps_per_epoch)

    def absolute(count: float) -> int:
        return math.ceil(steps * count) if count < 1 else int(count)  # below 1 it is a share of all steps

    def rhythm(strategy: str, every: float) -> Rhythm:
        return Rhythm(strategy, absolute(every) if strategy == "steps" else None)

    return Schedule(
        processes=processes,
        sequences_per_step=per_step * accumulation,
        tokens_per_step=tokens_per_sequence * per_step * accumulation,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch if settings["max_steps"] > 0 else epochs,
        warmup_steps=absolute(settings["warmup_steps"]),
        evaluation=rhythm(settings["eval_strategy"], settings["eval_steps"] or settings["logging_steps"]),
        saving=rhythm(settings["save_strategy"], settings["save_steps"]),
    )


def pieces(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """The row's text, cut where training begins and ends; special tokens are part of the text.

    Decoders of SentencePiece treat the first token of what they get in its own way, so each piece is what the text
    from the start of the row to its end has more than the text to its beginning.
    """
    trained = [label != NOT_TRAINED for label in labels]
    borders = [place for place in range(1, len(trained)) if trained[place] != trained[place - 1]]

    def text(start: int, end: int) -> str:
        return tokenizer.decode(
            list(input_ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    found: list[Piece] = []
    start, before = 0, ""
    for end in [*borders, len(trained)]:
        upto = text(0, end)
        found.append(Piece(upto[len(before) :] if upto.startswith(before) else text(start, end), trained[end - 1]))
        start, before = end, upto
    return found


def warnings_of(data: Prepared) -> list[str]:
    """What a person should know of the data, though nothing keeps it from being trained."""
    found = []
    for name, account in data.accounts.items():
        if account.duplicates.example:
            first, second = account.duplicates.example
            found.append(
                f"{account.duplicates.rows:,} {name} rows repeat another word for word: {second} says what {first} says"
            )
    whole, question = data.overlap.conversations, data.overlap.questions
    if whole.example:
        found.append(
            f"{whole.rows:,} validation rows are in training word for word, so the validation loss flatters: "
            f"{whole.example[1]} says what {whole.example[0]} says"
        )
    if question.example and question.rows > whole.rows:
        found.append(
            f"{question.rows:,} validation rows begin with a user message that training has too: "
            f"{question.example[1]} asks what {question.example[0]} asks"
        )
    return found


def _warnings_of_schedule(steps: Schedule) -> list[str]:
    found = []
    if steps.warmup_steps >= steps.steps:
        found.append(
            f"all {steps.steps:,} steps are warm-up (training.warmup_steps: {steps.warmup_steps:,}): the learning "
            "rate never gets to its full height"
        )
    if steps.evaluation.steps and steps.evaluation.steps > steps.steps:
        found.append(
            f"nothing is evaluated: training.eval_steps is {steps.evaluation.steps:,}, and the run has "
            f"{steps.steps:,} steps"
        )
    return found


def outcomes(data: Prepared, recipe: Recipe) -> list[Outcome]:
    """Every kind of row that is not trained as it stands, the most frequent first."""
    bad = "refused" if recipe.data.on_bad_row == "error" else "left out"
    found = [Outcome(bad, kind, rows.count, rows.examples) for kind, rows in data.faults.items()]
    for name, account in data.accounts.items():
        for outcome, rows in account.overlong.items():
            reason = f"{name}, over {recipe.data.max_length:,} tokens"
            found.append(Outcome(outcome, reason, rows.count, rows.examples))
    return sorted(found, key=lambda one: -one.rows)


def _plan(recipe: Recipe, account: Account, steps: Schedule, cluster: Cluster) -> Plan:
    lengths = np.minimum(account.lengths, recipe.data.max_length)
    if recipe.data.overlong != "truncate":
        lengths = account.lengths[account.lengths <= recipe.data.max_length]
    return plan(
        recipe,
        shape_of(recipe, load_config(recipe.model)),
        cluster,
        lengths,
        steps=steps.steps,
        epochs=steps.epochs,
        sequences_per_step=steps.sequences_per_step,
    )


def _part(account: Account, recipe: Recipe) -> PartReport:
    documents = account.documents_per_sequence
    return PartReport(
        rows=account.rows,
        tokens=account.tokens,
        trained_tokens=account.trained_tokens,
        rows_with_system_message=account.rows_with_system,
        distinct_system_messages=account.distinct_systems,
        lengths=quantiles(account.lengths),
        histogram=histogram(account.lengths),
        longest_tokens=account.longest,
        longest_place=account.longest_place,
        sequences=account.sequences,
        filling=account.tokens_per_sequence / recipe.data.max_length if recipe.data.packing else None,
        documents_per_sequence_mean=float(documents.mean()) if len(documents) else 0.0,
        documents_per_sequence_max=int(documents.max(initial=0)),
        duplicates=account.duplicates,
    )


def _example(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    return Example(
        place=row.place,
        tokens=len(row.input_ids),
        trained_tokens=int((row.labels != NOT_TRAINED).sum()),
        system_message=row.has_system,
        pieces=pieces(tokenizer, row.input_ids.tolist(), row.labels.tolist()),
    )
