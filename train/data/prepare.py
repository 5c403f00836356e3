"""Sources -> tokens on disk -> splits: the data of a run, and the report of every row that is not trained.

Tokens are made once and cached (`train.data.tokens.source`). Which rows are trained, how often, with which weight of
their source, truncated to which length and packed into which sequences is computed at each start.
"""

import difflib
import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from train.data.cache import Entry
from train.data.diagnostics import find_data_error, no_usable_row
from train.data.min_gain import apply_min_gain
from train.data.pair_splits import build_pair_split
from train.data.prepared_data import CachedSource, PreparedData, Split, UnreadText
from train.data.siblings import LeftOutRows, limit_siblings, pair_rows
from train.data.sources.mixture import apply_weight, hold_out
from train.data.sources.names import name_sources
from train.data.sources.source import BadRow, BadRows, OpenSource
from train.data.splits import build_split
from train.data.stats import Overlap, Repeats, find_shared
from train.data.tokens.pairs import TokenPairs
from train.data.tokens.source import ROWS, tokenize_source
from train.data.tokens.table import TokenTable
from train.errors import UserError
from train.ranks import world_size
from train.recipe import Recipe, Source
from train.recipe.schedule import sequences_per_step


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Read, tokenize and pack the data of a recipe. The tokenizer holds the template with its generation marks.

    The same recipe and data give the same rows in the same order, in every process.
    Raises UserError if a row can't be trained and the recipe doesn't say to skip it: one error for all rows.
    """
    data = examine(recipe, tokenizer)
    error = find_data_error(data, recipe)
    if error:
        raise UserError(error)
    return data


def examine(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Do what `prepare` does, but leave out and count the rows that the recipe refuses; no row may be left.

    Raises UserError if a source can't be read or no row of it can be trained.
    """
    section = recipe.data
    validation = () if section.validation is None or isinstance(section.validation, float) else section.validation
    sources = [(f"data.sources.{number}", source) for number, source in enumerate(section.sources)]
    sources += [(f"data.validation.{number}", source) for number, source in enumerate(validation)]
    tokenized = [tokenize_source(key, source, recipe, tokenizer) for key, source in sources]
    table = TokenTable(
        [entry.folder / ROWS for entry, _ in tokenized],
        [opened.files for _, opened in tokenized],
        [source.loss_weight for _, source in sources],
        source_names=[*name_sources(section.sources), *name_sources(validation)],
    )
    errors = _collect_errors(tokenized)
    for (key, source), size in zip(sources, np.diff(table.source_ends), strict=True):
        if not size:
            raise no_usable_row(key, source, errors)

    first_rows = np.flatnonzero(np.diff(table.conversations, prepend=-1))  # of each conversation
    borders = np.searchsorted(first_rows, table.source_ends)
    filtered = [
        apply_min_gain(key, source, np.arange(start, end), table, first_rows)
        for (key, source), (start, end) in zip(sources, pairwise(borders), strict=True)
    ]
    limited = [
        limit_siblings(key, source, kept, table, first_rows, recipe.seed)
        for (key, source), (kept, _) in zip(sources, filtered, strict=True)
    ]
    by_source = [kept for kept, _ in limited]
    left_out = [rows for _, rows in limited if rows]
    pairs = None
    if recipe.preference:
        pairs, by_source, unpaired = _pair(sources, by_source, table, recipe)
        first_rows = pairs.rows[:, 0]
        left_out += unpaired
    # From here on the numbers are those of conversations, or of pairs.
    training, held_out = by_source[: len(section.sources)], by_source[len(section.sources) :]
    if isinstance(section.validation, float):
        questions = [table.questions[first_rows[numbers]] for numbers in training]
        masks = hold_out(questions, section.validation, recipe.seed)
        held_out = [numbers[mask] for numbers, mask in zip(training, masks, strict=True)]
        training = [numbers[~mask] for numbers, mask in zip(training, masks, strict=True)]
    else:
        held_out = [
            apply_weight(*sources[len(training) + source], numbers, recipe.seed)
            for source, numbers in enumerate(held_out)
        ]
    training = [apply_weight(*sources[source], numbers, recipe.seed) for source, numbers in enumerate(training)]

    def build(numbers: NDArray[np.int64], multiple_of: int) -> tuple[Split, NDArray[np.int64]]:
        if pairs is not None:
            return build_pair_split(pairs.select(numbers), recipe, multiple_of)
        return build_split(numbers, table, recipe, multiple_of)

    # The number of sequences is a multiple of those of one step over all ranks, so ranks get equally many, and the
    # sequences are the same however a step is divided into ranks, batches and accumulation.
    train, trained = build(np.concatenate(training), sequences_per_step(recipe, world_size()))
    validation_split: Split | None = None
    overlap = Overlap()
    if held_out:
        step = sequences_per_step(recipe, world_size(), evaluation=True)
        validation_split, validated = build(np.concatenate(held_out), step)
        overlap = _find_overlap(table, trained, validated)

    unread: list[UnreadText] = []
    misspelled: list[str] = []
    unused: list[str] = []
    for (key, source), (entry, opened) in zip(sources, tokenized, strict=True):
        texts = _list_unread(key, source, entry, opened)
        unread += texts
        _check_ignore(key, source, [text.name for text in texts], misspelled, unused)
    return PreparedData(
        train,
        validation_split,
        errors,
        overlap,
        caches=[
            CachedSource(
                source.path, entry.key, str(entry.folder), entry.hit, entry.facts["tokenizer"], entry.facts["tokens"]
            )
            for (_, source), (entry, _) in zip(sources, tokenized, strict=True)
        ],
        escaped=sum(entry.facts["escaped"] for entry, _ in tokenized),
        skipped_files=list(dict.fromkeys(path for _, opened in tokenized for path in opened.skipped_files)),
        metadata_files=list(dict.fromkeys(file for _, opened in tokenized for file in opened.metadata_files)),
        unread=unread,
        misspelled_ignores=misspelled,
        unused_ignores=unused,
        gain_filters=[gain_filter for _, gain_filter in filtered if gain_filter],
        left_out=left_out,
    )


def _pair(
    sources: Sequence[tuple[str, Source]], by_source: Sequence[NDArray[np.int64]], table: TokenTable, recipe: Recipe
) -> tuple[TokenPairs, list[NDArray[np.int64]], list[LeftOutRows]]:
    """Return the pairs of all sources, the numbers of those of each source, and the rows that make none."""
    assert recipe.preference is not None
    paired = [
        pair_rows(key, source, conversations, table, recipe.preference, recipe.seed)
        for (key, source), conversations in zip(sources, by_source, strict=True)
    ]
    ends = np.cumsum([len(rows) for rows, _ in paired])
    numbers = np.split(np.arange(ends[-1]), ends[:-1])
    pairs = TokenPairs(table, np.concatenate([rows for rows, _ in paired]))
    return pairs, numbers, [unpaired for _, unpaired in paired if unpaired]


def _collect_errors(tokenized: Sequence[tuple[Entry, OpenSource]]) -> dict[str, BadRows]:
    """Return the rows of all sources that can't be trained, by kind of error."""
    errors: dict[str, BadRows] = {}
    for entry, opened in tokenized:
        for kind, (count, examples) in entry.facts["errors"].items():
            bad = errors.setdefault(kind, BadRows())
            bad.count += count
            bad.examples += [BadRow(opened.files[file] + place, detail) for file, place, detail in examples]
            del bad.examples[3:]
    return errors


def _list_unread(key: str, source: Source, entry: Entry, opened: OpenSource) -> list[UnreadText]:
    """Return the columns and message keys of a source that no format reads."""
    unread = []
    for name, (rows, losing, example) in sorted(entry.facts["unread"].items()):
        bad_row = None
        if example:
            file, place, text = example
            bad_row = BadRow(opened.files[file] + place, json.dumps(text, ensure_ascii=False))
        unread.append(UnreadText(key, name, rows, losing, name in source.ignore, bad_row))
    return unread


def _check_ignore(key: str, source: Source, names: list[str], misspelled: list[str], unused: list[str]) -> None:
    """Add a sentence to one of two lists for each name in `ignore` that is none of `names`, which rows have."""
    for name in source.ignore:
        if name in names:
            continue
        sentence = f"{key}.ignore: no row of {source.path} has a value under `{name}`"
        similar = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
        if similar:
            misspelled.append(f"{sentence}. Did you mean {' or '.join(similar)}?")
        else:
            unused.append(sentence)


def _find_overlap(table: TokenTable, training: NDArray[np.int64], validation: NDArray[np.int64]) -> Overlap:
    """Return the overlap of two splits, each given as a row of each of its conversations."""

    def repeats(digests: NDArray[np.bytes_]) -> Repeats:
        return find_shared(
            digests[training],
            digests[validation],
            lambda number: table.place(training[number]),
            lambda number: table.place(validation[number]),
        )

    return Overlap(repeats(table.questions), repeats(table.digests))
