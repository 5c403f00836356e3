"""Sources -> tokens on disk -> the sequences that are trained, and the account of what became of every row.

Tokens are made once (`tokenize_source`). Which rows are trained, how often, cut to which length and in which sequences is
worked out anew at each start, from numbers alone.
"""

import difflib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import yaml
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from train.data.cache import Entry, cache_key, get_or_build
from train.data.chat.assistant_spans import NO_TOOLS
from train.data.chat.rendering import REASONING_LOST
from train.data.dataset import PackedDataset
from train.data.packing import PackingPlan, plan
from train.data.sources.mixture import held_out, weighted
from train.data.sources.source import BadRow, BadRows, OpenSource
from train.data.stats import Overlap, Repeats, choose_examples, duplicates, shared
from train.data.tokens.source import ROWS, cache_folder, tokenize_source
from train.data.tokens.table import TokenRows
from train.errors import UserError
from train.formatting import format_count
from train.progress import progress_bar
from train.ranks import world_size
from train.recipe import DataSection, Recipe, Source
from train.recipe.schedule import sequences_per_step

_PLAN = "plan"
_OF_ANOTHER_FORMAT = {"missing column", "wrong type", "unknown role", "empty content", "no assistant turn"}
"""Kinds of faults that all rows have where they are read in a format that is not theirs."""


class ExampleRow(NamedTuple):
    """One row as it is trained: token ids, as many labels, where it stands and whether it has a system message."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int64]
    place: str
    has_system: bool


@dataclass
class SplitStats:
    """What became of the rows of one part.

    `conversations`: those that could be tokenized, as often as the weights say. `rows`: those trained; a template that
    rewrites history makes several of one conversation. `tokens` are counted after cutting; `overlong_tokens` are those
    lost to it. `lengths`: tokens of every row before cutting or dropping. `overlong`: rows longer than data.max_length
    by what became of them, refused, dropped or truncated. `documents_per_sequence`: rows in each sequence.
    `examples`: a few rows to look at.
    """

    conversations: int = 0
    rows: int = 0
    rows_with_system: int = 0
    distinct_systems: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    longest_place: str = ""
    overlong: dict[str, BadRows] = field(default_factory=dict)
    overlong_tokens: int = 0
    documents_per_sequence: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    duplicates: Repeats = field(default_factory=Repeats)
    examples: list[ExampleRow] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """Rows of the data set that is trained: packed ones where the recipe packs."""
        return len(self.documents_per_sequence)

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of tokens in a row as it is trained."""
        return self.tokens / max(self.sequences, 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, before cutting."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True)
class Split:
    """The rows of training or validation."""

    dataset: PackedDataset
    stats: SplitStats


@dataclass(frozen=True, slots=True)
class CachedSource:
    """Place of the tokens of one source.

    `hit`: they were there. `how`: which tokenizer made them. `tokens`: how many there are, and their digest.
    """

    source: str
    key: str
    folder: str
    hit: bool
    how: str
    tokens: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnreadText:
    """A column of a source, or a key of its messages, that nothing reads.

    `key`: the source in the recipe. `rows` have it, `losing` of them lose content with it, of which `example` is the
    first. `ignored`: the recipe says so.
    """

    key: str
    name: str
    rows: int
    losing: int
    ignored: bool
    example: BadRow | None = None


@dataclass(frozen=True)
class Prepared:
    """All that training needs of the data.

    `errors`: rows that can't be trained, by kind, whichever part's they are. `escaped`: rows of the sources that are
    trained with the control tokens typed in their text broken up. `skipped_files`, `metadata_files`: files beside the data
    that no row was read from, as their names are none of data, or as they describe it. `unread`: what no format reads
    of the rows. `misspelled_ignores`: names in a source's `ignore` that no row has, where a row has one like it; `unused_ignores`: those
    without a like, as of a column that is empty here.
    """

    train: Split
    validation: Split | None
    errors: Mapping[str, BadRows] = field(default_factory=dict)
    overlap: Overlap = field(default_factory=Overlap)
    caches: Sequence[CachedSource] = ()
    escaped: int = 0
    skipped_files: Sequence[Path] = ()
    metadata_files: Sequence[str] = ()
    unread: Sequence[UnreadText] = ()
    misspelled_ignores: Sequence[str] = ()
    unused_ignores: Sequence[str] = ()

    @property
    def stats(self) -> dict[str, SplitStats]:
        """The accounts of the parts that there are, by name."""
        parts = {"training": self.train, "validation": self.validation}
        return {name: part.stats for name, part in parts.items() if part}


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, encode and pack what the recipe names. The tokenizer holds the template with its generation marks.

    The same recipe and data give the same rows in the same order, in every process.
    Raises UserError for rows that can't be trained, unless the recipe says to leave them out: one error, with all.
    """
    data = examine(recipe, tokenizer)
    fault = find_data_error(data, recipe.data)
    if fault:
        raise UserError(fault)
    return data


def examine(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """`prepare`, but rows that the recipe refuses are left out and told by the account; there may be no row left.

    Raises UserError where a source can't be read or has no row of use.
    """
    section = recipe.data
    validation = () if section.validation is None or isinstance(section.validation, float) else section.validation
    named = [(f"data.sources.{number}", source) for number, source in enumerate(section.sources)]
    named += [(f"data.validation.{number}", source) for number, source in enumerate(validation)]
    tokenized = [tokenize_source(key, source, recipe, tokenizer) for key, source in named]
    rows = TokenRows([entry.folder / ROWS for entry, _ in tokenized], [opened.files for _, opened in tokenized])
    errors = _faults(tokenized)
    for (key, source), size in zip(named, np.diff(rows.source_ends), strict=True):
        if not size:
            readable = errors.keys() <= _OF_ANOTHER_FORMAT
            remedy = _remedy(errors, f"Is `{key}.format` the right one?" if readable else "Mend them")
            raise UserError(
                f"{key}: no row of {source.path} can be trained. Faults of all: {_named(errors)}. {remedy}"
                f"{'' if remedy.endswith('?') else '.'}"
            )

    firsts = np.flatnonzero(np.diff(rows.conversations, prepend=-1))  # the first row of each conversation
    borders = np.searchsorted(firsts, rows.source_ends)
    of_sources = [np.arange(start, end) for start, end in pairwise(borders)]
    training, held = of_sources[: len(section.sources)], of_sources[len(section.sources) :]
    if isinstance(section.validation, float):
        masks = held_out([rows.questions[firsts[part]] for part in training], section.validation, recipe.seed)
        held = [part[mask] for part, mask in zip(training, masks, strict=True)]
        training = [part[~mask] for part, mask in zip(training, masks, strict=True)]
    else:
        held = [weighted(*named[len(training) + number], part, recipe.seed) for number, part in enumerate(held)]
    training = [weighted(*named[number], part, recipe.seed) for number, part in enumerate(training)]

    parts = {
        name: _part(
            np.concatenate(conversations),
            rows,
            recipe,
            sequences_per_step(recipe, world_size(), evaluation=name == "validation"),
        )
        for name, conversations in (("training", training), ("validation", held))
        if conversations
    }
    caches = [
        CachedSource(
            source.path, entry.key, str(entry.folder), entry.hit, entry.facts["tokenizer"], entry.facts["tokens"]
        )
        for (_, source), (entry, _) in zip(named, tokenized, strict=True)
    ]
    escaped = sum(entry.facts["escaped"] for entry, _ in tokenized)
    skipped_files = list(dict.fromkeys(path for _, opened in tokenized for path in opened.skipped_files))
    metadata_files = list(dict.fromkeys(named for _, opened in tokenized for named in opened.metadata_files))
    train, trained = parts["training"]
    tested, overlap = None, Overlap()
    if "validation" in parts:
        tested, validated = parts["validation"]
        overlap = _overlap(rows, firsts[trained], firsts[validated])
    unread = [
        _unread(key, source, entry, opened) for (key, source), (entry, opened) in zip(named, tokenized, strict=True)
    ]
    return Prepared(
        train,
        tested,
        errors,
        overlap,
        caches,
        escaped,
        skipped_files,
        metadata_files,
        unread=[one for of_source, *_ in unread for one in of_source],
        misspelled_ignores=[sentence for _, of_source, _ in unread for sentence in of_source],
        unused_ignores=[sentence for _, _, of_source in unread for sentence in of_source],
    )


def _unread(
    key: str, source: Source, entry: Entry, opened: OpenSource
) -> tuple[list[UnreadText], list[str], list[str]]:
    """Return what nothing reads of a source, and sentences for names in its `ignore`: misspelt ones, absent ones."""
    unread = []
    for name, (rows, losing, example) in sorted(entry.facts["unread"].items()):
        bad = (
            BadRow(opened.files[example[0]] + example[1], json.dumps(example[2], ensure_ascii=False))
            if example
            else None
        )
        unread.append(UnreadText(key, name, rows, losing, name in source.ignore, bad))
    names = [one.name for one in unread]
    misspelled_ignores, unused_ignores = [], []
    for name in source.ignore:
        near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
        if name in names:
            continue
        nothing = f"{key}.ignore: no row of {source.path} has a value under `{name}`"
        if near:
            misspelled_ignores.append(f"{nothing}. Did you mean {' or '.join(near)}?")
        else:
            unused_ignores.append(nothing)
    return unread, misspelled_ignores, unused_ignores


def _overlap(rows: TokenRows, training: NDArray[np.int64], validation: NDArray[np.int64]) -> Overlap:
    """`training`, `validation`: the first rows of the conversations that have a row in that part."""

    def repeats(digests: NDArray[np.bytes_]) -> Repeats:
        return shared(
            digests[training],
            digests[validation],
            lambda place: rows.place(training[place]),
            lambda place: rows.place(validation[place]),
        )

    return Overlap(repeats(rows.questions), repeats(rows.digests))


def find_data_error(data: Prepared, section: DataSection) -> str | None:
    """Why these rows can't be trained under this recipe, and what to change: all of it in one paragraph, or None."""
    losing = (one for one in data.unread if one.losing and not one.ignored)
    lost = [_lost(key, list(of_source)) for key, of_source in groupby(losing, lambda one: one.key)]
    reasons = []
    if data.errors and section.on_bad_row == "error":
        remedy = _remedy(data.errors, "Mend them")
        reasons.append(
            f"rows that can't be trained: {_named(data.errors)}. {remedy}, or leave them out (they are counted on the "
            "screen) with `data.on_bad_row: skip`."
        )
    for name, stats in data.stats.items():
        if refused := stats.overlong.get("refused"):
            reasons.append(
                f"{refused.count:,} {name} rows have more tokens than data.max_length ({section.max_length:,}); the "
                f"longest has {stats.longest:,} ({stats.longest_place}). Write a larger max_length, or say what "
                "happens to them: `data.overlong: drop` or `data.overlong: truncate`."
            )
        if not stats.rows:
            overlong = sum(rows.count for rows in stats.overlong.values())
            reasons.append(
                f"no {name} row is left of {stats.conversations:,}, as {overlong:,} are longer than data.max_length "
                f"({section.max_length:,}); the longest has {stats.longest:,} tokens."
            )
    rows = [f"data: {' '.join(reasons)}"] if reasons else []
    return " ".join([*lost, *data.misspelled_ignores, *rows]) or None


def _lost(key: str, lost: Sequence[UnreadText]) -> str:
    """Return why a source may not be trained of which content would be left out."""
    named = "; ".join(f"`{one.name}` in {format_count(one.losing, 'row')}, first {one.example}" for one in lost)
    names = yaml.safe_dump([one.name for one in lost], default_flow_style=True, allow_unicode=True, width=math.inf)
    return (
        f"{key}: text that is not read, so the model would be trained without it: {named}. Rename it to what is read "
        f"(recipes/README.md lists them), or leave it out with `{key}.ignore: {names.strip()}`."
    )


def _named(errors: Mapping[str, BadRows]) -> str:
    kinds = sorted(errors.items(), key=lambda item: -item[1].count)
    return "; ".join(f"{rows.count:,} {kind}: {' | '.join(map(str, rows.examples))}" for kind, rows in kinds)


def _remedy(errors: Mapping[str, BadRows], otherwise: str) -> str:
    """Advice for rows with these faults: `otherwise`, unless all that they need is a template with tools."""
    if REASONING_LOST in errors:
        return (
            "Choose a `chat.template` that writes reasoning, or leave it out with "
            f"`ignore: ['messages[].thinking']` under the source, by the name that it has there. {otherwise}"
        )
    if NO_TOOLS not in errors:
        return otherwise
    template = "Write `chat.template: chatml-tools`, where the tokenizer has <|im_start|> and <|im_end|>, or the path "
    template += "of a template that writes tools and their calls"
    return template if len(errors) == 1 else f"{template}. For the rest: {otherwise[0].lower()}{otherwise[1:]}"


def _faults(tokenized: Sequence[tuple[Entry, OpenSource]]) -> dict[str, BadRows]:
    merged: dict[str, BadRows] = {}
    for entry, opened in tokenized:
        for kind, (count, examples) in entry.facts["errors"].items():
            bad = merged.setdefault(kind, BadRows())
            bad.count += count
            bad.examples += [BadRow(opened.files[file] + place, detail) for file, place, detail in examples]
            del bad.examples[3:]
    return merged


def _part(
    conversations: NDArray[np.int64], rows: TokenRows, recipe: Recipe, multiple_of: int
) -> tuple[Split, NDArray[np.int64]]:
    """The rows of these conversations as they are trained, and which of the conversations have any, each once.

    `multiple_of`: sequences of all ranks in one step. The number of sequences is a multiple of it, so that all ranks
    get equally many, and the same sequences however a step is split into ranks, batches and accumulation.
    """
    section = recipe.data
    stats = SplitStats(conversations=len(conversations))
    everything = _rows_of(conversations, rows.conversations)
    stats.lengths = rows.lengths[everything]
    if len(everything):
        stats.longest_place = rows.place(everything[int(stats.lengths.argmax())])
    chosen = _fitting(everything, rows, section, stats)
    stats.rows = len(chosen)
    stats.rows_with_system = int(rows.has_system[chosen].sum())
    stats.distinct_systems = rows.distinct_systems(chosen)

    lengths = np.minimum(rows.lengths[chosen], section.max_length)
    sequences = PackedDataset(
        rows,
        chosen,
        section.max_length,
        lambda epoch: _plan(lengths, recipe, multiple_of, epoch if section.repack else 0),
        packed=section.packing,
    )
    stats.tokens = int(lengths.sum())
    stats.trained_tokens = int(rows.trained_tokens[chosen].sum()) - _cut_off(chosen, rows, section.max_length)
    stats.documents_per_sequence = np.diff(sequences.plan_of(0).ends).astype(np.int32)

    _, first = np.unique(rows.conversations[chosen], return_index=True)  # of rows that weights repeat, templates split
    once = np.sort(first)
    stats.duplicates = duplicates(rows.digests[chosen[once]], lambda place: rows.place(chosen[once[place]]))
    _, different = np.unique(rows.digests[chosen[once]], return_index=True)
    to_show = once[np.sort(different)]
    chance = random.Random(f"part {recipe.seed}")
    for number in choose_examples(rows.has_system[chosen[to_show]].tolist(), recipe.seed):
        parts = np.flatnonzero(rows.conversations[chosen] == rows.conversations[chosen[to_show[number]]])
        place = chance.choice(parts.tolist())  # where a template splits the conversation: any of its rows
        row = int(chosen[place])
        stats.examples.append(ExampleRow(*sequences.row(place), rows.place(row), bool(rows.has_system[row])))
    return Split(sequences, stats), rows.conversations[chosen[once]]


def _rows_of(conversations: NDArray[np.int64], of_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of each of the conversations, in their order."""
    starts = np.searchsorted(of_rows, conversations)
    counts = np.searchsorted(of_rows, conversations, side="right") - starts
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _fitting(
    everything: NDArray[np.int64], rows: TokenRows, section: DataSection, stats: SplitStats
) -> NDArray[np.int64]:
    """The rows that `data.overlong` leaves. Counts what becomes of the others."""
    length, longest = rows.lengths[everything], section.max_length
    overlong = length > longest
    truncated = overlong & (rows.first_trained[everything] < longest) & (section.overlong == "truncate")
    stats.overlong_tokens = int(length[overlong].sum()) - int(truncated.sum()) * longest
    name = "refused" if section.overlong == "error" else "dropped"
    for outcome, found in (("truncated", truncated), (name, overlong & ~truncated)):
        numbers = np.flatnonzero(found)
        if len(numbers):
            bad = stats.overlong[outcome] = BadRows(len(numbers))
            for number in numbers[:3]:
                bad.examples.append(BadRow(rows.place(everything[number]), f"{length[number]:,} tokens"))
    return everything[~overlong | truncated]


def _cut_off(chosen: NDArray[np.int64], rows: TokenRows, longest: int) -> int:
    """Trained tokens of these rows that lie behind `longest`."""
    cut = chosen[rows.lengths[chosen] > longest]
    beyond = np.concatenate([np.empty((0, 2), np.int64), *(rows.trained(row) - longest for row in cut)])
    return int(np.diff(np.maximum(beyond, 0)).sum())


def _plan(lengths: NDArray[np.int32], recipe: Recipe, multiple_of: int, epoch: int) -> PackingPlan:
    """Which rows share a sequence; kept on disk, as a large one takes a while."""
    section = recipe.data
    capacity = section.max_length if section.packing else None
    if capacity is None:
        return plan(lengths, None)
    made_of = {
        "lengths": xxhash.xxh3_128(lengths.tobytes()).hexdigest(),
        "numbers": [capacity, multiple_of, recipe.seed, epoch],
    }

    def build(folder: Path) -> dict[str, Any]:
        made = plan(lengths, capacity, multiple_of=multiple_of, seed=recipe.seed, epoch=epoch)
        made.save(folder / _PLAN)
        return {"sequences": len(made)}

    with progress_bar("packing", unit="rows"):
        try:
            return PackingPlan.load(get_or_build(cache_folder(recipe), cache_key(made_of), build).folder / _PLAN)
        except UserError:  # the folder can't be written: no reason to stop in the middle of a run
            return plan(lengths, capacity, multiple_of=multiple_of, seed=recipe.seed, epoch=epoch)
