"""Data of the report of `--check`: the rows as they would be trained, dropped rows, the schedule and the plan."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedTokenizerBase

from train.data.chat.system_role import describe_effect
from train.data.diagnostics import (
    DroppedRows,
    describe_loss_weights,
    find_data_error,
    find_data_warnings,
    find_dropped_rows,
)
from train.data.loss_mask import NOT_TRAINED
from train.data.pair_dataset import PairDataset
from train.data.prepared_data import CachedSource, ExampleRow, PairStats, PreparedData, SplitStats, UnreadText
from train.data.stats import Bin, Overlap, Repeats, histogram, percentiles
from train.model.tokenizer import ChatTokenizer
from train.preflight.checks import find_run_errors
from train.recipe import Recipe
from train.recipe.schedule import Schedule, compute_schedule, schedule_error, schedule_warnings, sequences_per_step
from train.samples.rows import describe_samples, load_sample_rows
from train.system_gain.validation_rows import describe_gain, gain_metric_error, load_gain_rows

if TYPE_CHECKING:  # the plan imports modelling code
    from train.preflight.plan.cluster import Cluster
    from train.preflight.plan.plan import RunPlan


@dataclass(frozen=True)
class Piece:
    """A part of a row's text, all of whose tokens are trained, or none."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One row as the model will see it; the texts of `pieces` in order are its text.

    - `default_system`: the default system message was inserted, as the conversation has none of its own;
    - `loss_weights`: of its trained tokens, each value once.
    """

    place: str
    tokens: int
    trained_tokens: int
    system_message: bool
    default_system: bool
    loss_weights: list[float]
    pieces: list[Piece]


@dataclass(frozen=True)
class SplitReport:
    """Statistics of the training or the validation rows.

    - `conversations` give `rows_of_conversations` rows: more than one each if the template rewrites earlier turns;
    - `rows`: those that are trained;
    - `lengths` (percentiles, in tokens), `histogram`, `longest_tokens`: of all rows before truncation and dropping;
    - `filling`: share of the sequences' capacity that holds tokens, 0 to 1; null without packing;
    - `duplicates`: rows equal to another, except those that a source's weight repeats;
    - `rows_with_loss_weight`: rows of which a part has a loss weight other than 1;
    - `rows_with_default_system`: rows without a system message of their own into which a default is inserted.
    """

    conversations: int
    rows_of_conversations: int
    rows: int
    tokens: int
    trained_tokens: int
    rows_with_system_message: int
    rows_with_default_system: int
    distinct_system_messages: int
    rows_with_loss_weight: int
    lengths: dict[str, int]
    histogram: list[Bin]
    longest_tokens: int
    longest_place: str
    sequences: int
    filling: float | None
    documents_per_sequence_mean: float
    documents_per_sequence_max: int
    duplicates: Repeats

    unit: ClassVar[str] = "row"
    """The word for what is counted as a row."""


@dataclass(frozen=True)
class PairSplitReport(SplitReport):
    """Statistics of training or validation pairs, in preference training.

    Counts of rows are of pairs, tokens those of both halves, lengths those of the longer half.
    """

    pairs: PairStats

    unit: ClassVar[str] = "pair"


@dataclass(frozen=True)
class Report:
    """Results of `--check`. `--json FILE` writes these fields under their names, and those of the classes above.

    - `error`: what has to change; null if `ready`;
    - `float8`: torchao's recipe for linear layers; null = they multiply in their weights' type;
    - `template`: its name;
    - `probe`: sentences on its treatment of system messages before `chat.system_role` is applied; empty if that
      changes nothing;
    - `chat`: the settings of the recipe; `system_messages`: sentences on their effect, found by rendering;
    - `validation`: null if the recipe has none;
    - `loss_weights`: sentences on rows and sources with loss weights other than 1;
    - `caches`: where the tokens of each source are kept;
    - `outcomes`: dropped rows; `unread`: columns and keys of messages that no format reads;
    - `system_gain`: a sentence on the rows that each evaluation measures it on;
    - `samples`: a sentence on the answers that each evaluation generates; null if it generates none;
    - `resumes_from`: the checkpoint that the run would resume from;
    - `finished`: a sentence on the finished run of this recipe in output_dir; null if there is none;
    - `plan`: null if no GPUs are has_default.
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
    training: SplitReport
    validation: SplitReport | None
    loss_weights: list[str]
    caches: list[CachedSource]
    outcomes: list[DroppedRows]
    unread: list[UnreadText]
    overlap: Overlap
    system_gain: str | None
    samples: str | None
    schedule: Schedule
    output_dir: str
    resumes_from: str | None
    finished: str | None
    plan: "RunPlan | None"
    examples: list[Example]


@dataclass(frozen=True)
class PreferenceReport(Report):
    """Results of `--check` on a recipe of preference training. `preference`: that section."""

    preference: dict[str, Any]


def build_report(
    recipe: Recipe,
    chat: ChatTokenizer,
    data: PreparedData,
    *,
    errors: Sequence[str] = (),
    notes: Sequence[str] = (),
    checkpoint: Path | None = None,
    finished: str | None = None,
    cluster: "Cluster | None" = None,
) -> Report:
    """Build the report on `data`.

    - `errors`, `notes`: sentences on the model, of which errors keep the run from starting;
    - `checkpoint`, `finished`: as in Report;
    - `cluster`: GPUs whose number decides the steps; without it, the processes that the launcher started do.
    """
    tokenizer, stats = chat.tokenizer, data.train.stats
    processes = cluster.processes if cluster else int(os.environ.get("WORLD_SIZE", "1"))
    gain = load_gain_rows(recipe, data, tokenizer)
    sequences = stats.sequences
    if cluster and recipe.data.packing:  # on these GPUs rows are packed into full steps
        multiple = sequences_per_step(recipe, processes)
        sequences = max(sequences, min(-(-sequences // multiple) * multiple, stats.rows))
    steps = compute_schedule(
        recipe.training, sequences, stats.tokens / max(sequences, 1), processes, recipe.model.sequence_parallel
    )
    all_errors = [
        find_data_error(data, recipe),
        gain_metric_error(recipe, gain),
        *find_run_errors(recipe, stats.sequences, processes),
        schedule_error(recipe.training, steps),
        *errors,
    ]
    effect = describe_effect(tokenizer, chat.probe, recipe.chat.default_system)
    has_default = effect.default is not None
    kind: Callable[..., Report] = Report
    if recipe.preference:
        kind = partial(PreferenceReport, preference=recipe.preference.model_dump(mode="json"))
    return kind(
        ready=not any(all_errors),
        error=" ".join(error for error in all_errors if error) or None,
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
        probe=chat.probe.describe() if effect.changed else [],
        chat=recipe.chat.model_dump(mode="json", exclude={"template"}),
        system_messages=effect.sentences,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        training=_part(stats, recipe, has_default),
        validation=_part(data.validation.stats, recipe, has_default) if data.validation else None,
        loss_weights=describe_loss_weights(data, recipe.data),
        caches=list(data.caches),
        outcomes=find_dropped_rows(data, recipe.data),
        unread=list(data.unread),
        overlap=data.overlap,
        system_gain=describe_gain(gain),
        samples=describe_samples(recipe, load_sample_rows(recipe, tokenizer)),
        schedule=steps,
        output_dir=recipe.output_dir,
        resumes_from=str(checkpoint) if checkpoint else None,
        finished=finished,
        plan=_plan(recipe, data, steps, cluster) if cluster else None,
        examples=[_example(tokenizer, row, has_default) for row in stats.examples],
    )


def split_pieces(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """Split a row's text where training begins and ends; special tokens are part of the text.

    SentencePiece decodes the first token of a sequence differently, so a piece is the text from the start of the row to
    the piece's end, without the text to its beginning.
    """
    trained = [label != NOT_TRAINED for label in labels]
    borders = [index for index in range(1, len(trained)) if trained[index] != trained[index - 1]]

    def text(start: int, end: int) -> str:
        return tokenizer.decode(
            list(input_ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    pieces: list[Piece] = []
    start, earlier = 0, ""
    for end in [*borders, len(trained)]:
        prefix = text(0, end)
        pieces.append(
            Piece(prefix[len(earlier) :] if prefix.startswith(earlier) else text(start, end), trained[end - 1])
        )
        start, earlier = end, prefix
    return pieces


def _float8_warnings(recipe: Recipe) -> list[str]:
    if recipe.model.float8 is None:
        return []
    from train.model.float8 import float8_warnings  # imports modelling code

    return float8_warnings(recipe)


def _plan(recipe: Recipe, data: PreparedData, steps: Schedule, cluster: "Cluster") -> "RunPlan":
    from train.model.load import trained_config
    from train.preflight.plan.candidates import Candidates
    from train.preflight.plan.plan import plan_run

    stats, dataset = data.train.stats, data.train.dataset
    documents = dataset.half_lengths.ravel() if isinstance(dataset, PairDataset) else dataset.lengths
    longest = stats.capacity if recipe.data.packing else int(dataset.lengths.max(initial=1))
    return plan_run(
        Candidates(recipe, trained_config(recipe), longest),
        cluster,
        documents,
        steps=steps.steps,
        epochs=steps.epochs,
        sequences_per_step=steps.sequences_per_step,
    )


def _part(stats: SplitStats, recipe: Recipe, has_default: bool) -> SplitReport:
    documents = stats.documents_per_sequence
    kind: Callable[..., SplitReport] = partial(PairSplitReport, pairs=stats.pairs) if stats.pairs else SplitReport
    return kind(
        conversations=stats.conversations,
        rows_of_conversations=len(stats.lengths),
        rows=stats.rows,
        tokens=stats.tokens,
        trained_tokens=stats.trained_tokens,
        rows_with_system_message=stats.rows_with_system,
        rows_with_default_system=stats.rows - stats.rows_with_system if has_default else 0,
        distinct_system_messages=stats.distinct_systems,
        rows_with_loss_weight=stats.rows_with_loss_weight,
        lengths=percentiles(stats.lengths),
        histogram=histogram(stats.lengths),
        longest_tokens=stats.longest,
        longest_place=stats.longest_place,
        sequences=stats.sequences,
        filling=stats.tokens_per_sequence / stats.capacity if recipe.data.packing else None,
        documents_per_sequence_mean=float(documents.mean()) if len(documents) else 0.0,
        documents_per_sequence_max=int(documents.max(initial=0)),
        duplicates=stats.duplicates,
    )


def _example(tokenizer: PreTrainedTokenizerBase, row: ExampleRow, has_default: bool) -> Example:
    return Example(
        place=row.place,
        tokens=len(row.input_ids),
        trained_tokens=int((row.labels != NOT_TRAINED).sum()),
        system_message=row.has_system,
        default_system=has_default and not row.has_system,
        loss_weights=row.loss_weights,
        pieces=split_pieces(tokenizer, row.input_ids.tolist(), row.labels.tolist()),
    )
