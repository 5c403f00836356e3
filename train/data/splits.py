"""Splits: conversations -> the rows that are trained, truncated or dropped by length, packed, and counted."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.cache import cache_key, get_or_build
from train.data.dataset import PackedDataset
from train.data.loss_mask import NOT_TRAINED
from train.data.packing import DOCUMENTS_PER_SEQUENCE, PackingPlan, plan_packing
from train.data.prepared_data import ExampleRow, Split, SplitStats
from train.data.sources.source import BadRow, BadRows
from train.data.stats import choose_examples, find_duplicates
from train.data.tokens.source import cache_folder
from train.data.tokens.table import TokenTable
from train.errors import UserError
from train.progress import progress_bar
from train.recipe import DataSection, Recipe

_PLAN = "plan"
"""The file of a cache entry that holds a packing plan."""


def build_split(
    conversations: NDArray[np.int64], table: TokenTable, recipe: Recipe, multiple_of: int
) -> tuple[Split, NDArray[np.int64]]:
    """Return the split of these conversations, and a row of each conversation that has one in it.

    `conversations`: int64, numbers of conversations in `table`, repeated as often as they are trained.
    `multiple_of`: the number of sequences is a multiple of it where rows are packed.
    """
    section = recipe.data
    stats = SplitStats(conversations=len(conversations), capacity=section.max_length)
    candidates = _rows_of(conversations, table.conversations)
    stats.lengths = table.lengths[candidates]
    if len(candidates):
        stats.longest_place = table.place(candidates[int(stats.lengths.argmax())])
    kept = keep_within_length(
        stats.lengths[:, None],
        table.first_trained[candidates][:, None],
        lambda number: table.place(candidates[number]),
        section,
        stats,
    )
    chosen = candidates[kept]
    stats.rows = len(chosen)
    stats.rows_with_system = int(table.has_system[chosen].sum())
    stats.distinct_systems = table.count_distinct_systems(chosen)
    stats.rows_with_loss_weight = int(table.has_loss_weight[chosen].sum())

    lengths = np.minimum(table.lengths[chosen], section.max_length)
    dataset = PackedDataset(
        table,
        chosen,
        section.max_length,
        lambda epoch: load_plan(lengths, recipe, multiple_of, epoch),
        packed=section.packing,
    )
    stats.tokens = int(lengths.sum())
    stats.trained_tokens = int(table.trained_tokens[chosen].sum()) - _count_cut(chosen, table, section.max_length)
    stats.documents_per_sequence = np.diff(dataset.plan_of(0).ends).astype(np.int32)

    # Each conversation once: weights repeat its rows, and a template may split it into several.
    _, firsts = np.unique(table.conversations[chosen], return_index=True)
    firsts = np.sort(firsts)
    stats.duplicates = find_duplicates(table.digests[chosen[firsts]], lambda row: table.place(chosen[firsts[row]]))
    _, distinct = np.unique(table.digests[chosen[firsts]], return_index=True)
    candidates = firsts[np.sort(distinct)]
    rng = random.Random(f"part {recipe.seed}")
    for number in choose_examples(table.has_system[chosen[candidates]].tolist(), recipe.seed):
        rows = np.flatnonzero(table.conversations[chosen] == table.conversations[chosen[candidates[number]]])
        position = rng.choice(rows.tolist())  # any of the rows of a conversation that the template splits
        row = int(chosen[position])
        ids, labels = dataset.row(position)
        weights = np.unique(dataset.loss_weights(position)[labels != NOT_TRAINED]).tolist()
        example = ExampleRow(ids, labels, table.place(row), bool(table.has_system[row]), weights)
        stats.examples.append(example)
    return Split(dataset, stats), chosen[firsts]


def _rows_of(conversations: NDArray[np.int64], conversation_of_row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of each of the conversations, in their order."""
    starts = np.searchsorted(conversation_of_row, conversations)
    counts = np.searchsorted(conversation_of_row, conversations, side="right") - starts
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def keep_within_length(
    lengths: NDArray[np.int32],
    first_trained: NDArray[np.int32],
    place: Callable[[int], str],
    section: DataSection,
    stats: SplitStats,
) -> NDArray[np.bool_]:
    """Return a mask of the rows that `data.overlong` keeps; count the others and the truncated ones in `stats`.

    `lengths`, `first_trained`: [rows, parts]; a pair has two parts, and stays or goes as one. `place`: of a row.
    """
    max_length = section.max_length
    overlong = (lengths > max_length).any(axis=1)
    truncated = overlong & (first_trained < max_length).all(axis=1) & (section.overlong == "truncate")
    stats.overlong_tokens = int(lengths[overlong].sum()) - int(np.minimum(lengths[truncated], max_length).sum())
    name = "refused" if section.overlong == "error" else "dropped"
    for outcome, mask in (("truncated", truncated), (name, overlong & ~truncated)):
        positions = np.flatnonzero(mask)
        if len(positions):
            bad = stats.overlong[outcome] = BadRows(len(positions))
            for position in positions[:3]:
                bad.examples.append(BadRow(place(position), f"{lengths[position].max():,} tokens"))
    return np.asarray(~overlong | truncated)


def _count_cut(chosen: NDArray[np.int64], table: TokenTable, max_length: int) -> int:
    """Count the trained tokens of these rows that lie behind `max_length`."""
    truncated = chosen[table.lengths[chosen] > max_length]
    beyond = np.concatenate([np.empty((0, 2), np.int64), *(table.trained(row) - max_length for row in truncated)])
    return int(np.diff(np.maximum(beyond, 0)).sum())


def load_plan(lengths: NDArray[np.int32], recipe: Recipe, multiple_of: int, epoch: int) -> PackingPlan:
    """Return the packing plan of an epoch, from the cache or computed now: a large one takes minutes."""
    if not recipe.data.packing:
        return plan_packing(lengths, None)
    capacity, epoch = recipe.sequence_length, epoch if recipe.data.repack else 0
    most = DOCUMENTS_PER_SEQUENCE // recipe.documents_per_row

    def compute() -> PackingPlan:
        return plan_packing(
            lengths, capacity, multiple_of=multiple_of, documents_per_sequence=most, seed=recipe.seed, epoch=epoch
        )

    def build(folder: Path) -> dict[str, Any]:
        plan = compute()
        plan.save(folder / _PLAN)
        return {"sequences": len(plan)}

    fingerprint = {
        "lengths": xxhash.xxh3_128(lengths.tobytes()).hexdigest(),
        "numbers": [capacity, multiple_of, recipe.seed, epoch],
        **({"documents": 2} if recipe.preference else {}),
    }
    with progress_bar("packing", unit="rows"):
        try:
            entry = get_or_build(cache_folder(recipe), cache_key(fingerprint), build)
        except UserError:  # the cache can't be written: no reason to stop in the middle of a run
            return compute()
        return PackingPlan.load(entry.folder / _PLAN)
