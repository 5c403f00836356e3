"""The facts that --check reports: the rows as they would be trained, what became of the others, the steps ahead."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from train.data.chat.system_role import describe_effect
from train.data.diagnostics import DroppedRows, find_data_warnings, find_dropped_rows
from train.data.loss_mask import NOT_TRAINED
from train.data.prepare import CachedSource, ExampleRow, Prepared, SplitStats, UnreadText, find_data_error
from train.data.stats import Bin, Overlap, Repeats, histogram, quantiles
from train.model.tokenizer import ChatTokenizer
from train.preflight.checks import run_faults
from train.recipe import Recipe
from train.recipe.schedule import Schedule, compute_schedule, schedule_error, schedule_warnings, sequences_per_step
from train.system_gain.validation_rows import describe_gain, gain_refusal, gain_rows

if TYPE_CHECKING:  # the plan imports modelling code
    from train.preflight.plan.plan import Cluster, Plan


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text of which every token is trained, or none."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One row as the model will see it. The texts of `pieces` in their order are its whole text.

    `default_system`: the conversation has no system message of its own, so a default was put in.
    """

    place: str
    tokens: int
    trained_tokens: int
    system_message: bool
    default_system: bool
    pieces: list[Piece]


@dataclass(frozen=True)
class PartReport:
    """Training or validation.

    `conversations` became `rows_of_conversations` rows: more, where the template rewrites earlier turns. `rows` are
    those that are trained; `lengths` (tokens, by percent of the rows), `histogram` and `longest_tokens` are of all rows
    before any was cut or dropped. `filling`: tokens of the room in all sequences, 0 to 1, null without
    packing. `duplicates`: rows that repeat another word for word, those that a source's weight repeats aside.
    `rows_with_default_system`: rows without a system message of their own, where a default is put in.
    """

    conversations: int
    rows_of_conversations: int
    rows: int
    tokens: int
    trained_tokens: int
    rows_with_system_message: int
    rows_with_default_system: int
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
class Report:
    """All that --check finds. `--json FILE` writes these fields under their names, and those of the classes above.

    `template`: which one. `probe`: what it does with system messages without our help, in words; nothing where it is
    used as it came. `chat`: the policies of the recipe. `system_messages`: what results, found by rendering.
    `caches`: where the tokens of each source are kept. `unread`: columns and keys of messages that nothing reads.

    `error` is what has to change and null where `ready`. `resumes_from`: the checkpoint that the run would go on from.
    `finished`: the run of this recipe is in output_dir, trained to its end; null where it isn't.
    `system_gain`: on what each evaluation measures it, in words.
    `float8`: how linear layers multiply, null where as their weights' type has it. `validation` is null where the
    recipe names none, `plan` where no GPUs are named.
    """

    ready: bool
    error: str | None
    warnings: list[str]
    model: str
    dtype: str
    float8: str | None
    template: str
    probe: list[str]
    chat: dict[str, Any]
    system_messages: list[str]
    max_length: int
    packing: bool
    training: PartReport
    validation: PartReport | None
    caches: list[CachedSource]
    outcomes: list[DroppedRows]
    unread: list[UnreadText]
    overlap: Overlap
    system_gain: str | None
    schedule: Schedule
    output_dir: str
    resumes_from: str | None
    finished: str | None
    plan: "Plan | None"
    examples: list[Example]


def build_report(
    recipe: Recipe,
    chat: ChatTokenizer,
    data: Prepared,
    *,
    errors: Sequence[str] = (),
    notes: Sequence[str] = (),
    checkpoint: Path | None = None,
    finished: str | None = None,
    cluster: "Cluster | None" = None,
) -> Report:
    """The facts of the report. `before`: the template as it came; the tokenizer has it as it is used.

    The steps are those on `cluster`, or else of the processes that the launcher starts.
    """
    tokenizer, account = chat.tokenizer, data.train.stats
    processes = cluster.processes if cluster else int(os.environ.get("WORLD_SIZE", "1"))
    gain = gain_rows(recipe, data, tokenizer)
    sequences = account.sequences
    if cluster and recipe.data.packing:  # on so many GPUs rows are packed into whole steps
        whole = sequences_per_step(recipe, processes)
        sequences = max(sequences, min(-(-sequences // whole) * whole, account.rows))
    steps = compute_schedule(recipe.training, sequences, account.tokens / max(sequences, 1), processes)
    faults = [
        find_data_error(data, recipe.data),
        gain_refusal(recipe, gain),
        *run_faults(recipe, account.sequences, processes),
        schedule_error(recipe.training, steps),
        *errors,
    ]
    systems = describe_effect(tokenizer, chat.probe, recipe.chat.default_system)
    given = systems.default is not None
    return Report(
        ready=not any(faults),
        error=" ".join(fault for fault in faults if fault) or None,
        warnings=[
            *notes,
            *find_data_warnings(data),
            *_float8_warnings(recipe),
            *schedule_warnings(recipe.training, steps, sequences),
        ],
        model=recipe.model.name_or_path,
        dtype=recipe.model.dtype,
        float8=recipe.model.float8,
        template=chat.template,
        probe=chat.probe.describe() if systems.changed else [],
        chat=recipe.chat.model_dump(mode="json", exclude={"template"}),
        system_messages=systems.sentences,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        training=_part(account, recipe, given),
        validation=_part(data.validation.stats, recipe, given) if data.validation else None,
        caches=list(data.caches),
        outcomes=find_dropped_rows(data, recipe.data),
        unread=list(data.unread),
        overlap=data.overlap,
        system_gain=describe_gain(gain),
        schedule=steps,
        output_dir=recipe.output_dir,
        resumes_from=str(checkpoint) if checkpoint else None,
        finished=finished,
        plan=_plan(recipe, account, steps, cluster) if cluster else None,
        examples=[_example(tokenizer, row, given) for row in account.examples],
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


def _float8_warnings(recipe: Recipe) -> list[str]:
    if recipe.model.float8 is None:
        return []
    from train.model.float8 import float8_warnings  # imports modelling code

    return float8_warnings(recipe)


def _plan(recipe: Recipe, account: SplitStats, steps: Schedule, cluster: "Cluster") -> "Plan":
    from train.model.architecture import shape_of
    from train.model.load import load_config
    from train.preflight.plan.plan import plan

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


def _part(account: SplitStats, recipe: Recipe, default_is_given: bool) -> PartReport:
    documents = account.documents_per_sequence
    return PartReport(
        conversations=account.conversations,
        rows_of_conversations=len(account.lengths),
        rows=account.rows,
        tokens=account.tokens,
        trained_tokens=account.trained_tokens,
        rows_with_system_message=account.rows_with_system,
        rows_with_default_system=account.rows - account.rows_with_system if default_is_given else 0,
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


def _example(tokenizer: PreTrainedTokenizerBase, row: ExampleRow, default_is_given: bool) -> Example:
    return Example(
        place=row.place,
        tokens=len(row.input_ids),
        trained_tokens=int((row.labels != NOT_TRAINED).sum()),
        system_message=row.has_system,
        default_system=default_is_given and not row.has_system,
        pieces=pieces(tokenizer, row.input_ids.tolist(), row.labels.tolist()),
    )
