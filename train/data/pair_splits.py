"""Splits of pairs: the pairs that are trained, truncated or dropped by the length of their halves, packed, counted."""

import numpy as np
import xxhash
from numpy.typing import NDArray

from train.data.loss_mask import NOT_TRAINED
from train.data.pair_dataset import PairDataset
from train.data.prepared_data import ExampleRow, PairStats, Split, SplitStats
from train.data.sources.pairs import HALVES
from train.data.sources.source import BadRow, BadRows
from train.data.splits import keep_within_length, load_plan
from train.data.stats import choose_examples, find_duplicates, find_shared
from train.data.tokens.pairs import TokenPairs
from train.recipe import Recipe

_EXAMPLES = 3


def build_pair_split(pairs: TokenPairs, recipe: Recipe, multiple_of: int) -> tuple[Split, NDArray[np.int64]]:
    """Return the split of these pairs, and the row of the chosen answer of each pair in it.

    `multiple_of`: the number of sequences is a multiple of it where pairs are packed.
    """
    table, max_length, candidates = pairs.table, recipe.data.max_length, pairs.rows[:, 0]
    longer_halves = pairs.lengths.max(axis=1, initial=0)
    stats = SplitStats(conversations=len(pairs), capacity=recipe.sequence_length, lengths=longer_halves)
    if len(pairs):
        stats.longest_place = table.place(candidates[int(stats.lengths.argmax())])
    same = _find_same_when_cut(pairs, max_length) if recipe.data.overlong == "truncate" else []
    if same:
        examples = [
            BadRow(table.place(candidates[number]), f"{pairs.lengths[number].max():,} tokens")
            for number in same[:_EXAMPLES]
        ]
        stats.same_when_cut = BadRows(len(same), examples)
    lost_tokens = int(pairs.lengths[same].sum())
    pairs = pairs.select(np.setdiff1d(np.arange(len(pairs)), same))
    candidates = pairs.rows[:, 0]
    kept = keep_within_length(
        pairs.lengths, pairs.first_trained, lambda number: table.place(candidates[number]), recipe.data, stats
    )
    stats.overlong_tokens += lost_tokens
    pairs = pairs.select(np.flatnonzero(kept))
    dataset = PairDataset(pairs, max_length, lambda lengths, epoch: load_plan(lengths, recipe, multiple_of, epoch))
    chosen = pairs.rows[:, 0]
    stats.rows = len(pairs)
    stats.rows_with_system = int(table.has_system[chosen].sum())
    stats.distinct_systems = table.count_distinct_systems(chosen)
    stats.rows_with_loss_weight = int(table.has_loss_weight[pairs.rows].any(axis=1).sum())
    stats.tokens = int(dataset.lengths.sum())
    stats.documents_per_sequence = np.diff(dataset.plan_of(0).ends).astype(np.int32)

    trained = table.trained_tokens[pairs.rows]
    for number in np.flatnonzero((pairs.lengths > max_length).any(axis=1)):
        trained[number] = [(labels != NOT_TRAINED).sum() for _, labels in dataset.pair(number)]
    stats.trained_tokens = int(trained.sum())

    # Each pair once: weights repeat it.
    _, distinct = np.unique(pairs.rows, axis=0, return_index=True)
    distinct.sort()
    digests = [[xxhash.xxh3_128_digest(ids.tobytes()) for ids, _ in pairs.halves(number)] for number in distinct]
    forward, backward = (np.array([b"".join(halves[::step]) for halves in digests], "S32") for step in (1, -1))

    def place(number: int) -> str:
        return table.place(chosen[distinct[number]])

    stats.duplicates = find_duplicates(forward, place)
    stats.pairs = PairStats(
        siblings=int(pairs.is_sibling.sum()),
        chosen_tokens=int(trained[:, 0].sum()),
        rejected_tokens=int(trained[:, 1].sum()),
        chosen_longer=int((trained[:, 0] > trained[:, 1]).sum()),
        rejected_longer=int((trained[:, 0] < trained[:, 1]).sum()),
        contradictory=find_shared(forward, backward, place, place),
    )
    has_system = table.has_system[chosen[distinct]].tolist()
    for number in distinct[choose_examples(has_system, recipe.seed, _EXAMPLES)].tolist():
        own, other = map(table.place, pairs.rows[number].tolist())
        answers = f"{HALVES[1]}, the answer of {other}" if pairs.is_sibling[number] else HALVES[1]
        for half, (ids, labels) in zip((HALVES[0], answers), dataset.pair(number), strict=True):
            example = ExampleRow(ids, labels, f"{own}, {half}", bool(table.has_system[chosen[number]]), [1.0])
            stats.examples.append(example)
    return Split(dataset, stats), chosen[distinct]


def _find_same_when_cut(pairs: TokenPairs, max_length: int) -> list[int]:
    """Return the numbers of the pairs whose answers differ only behind `max_length`: nothing can be preferred there."""
    cut = np.minimum(pairs.lengths, max_length)
    has_answers = (pairs.first_trained < max_length).all(axis=1)
    candidates = np.flatnonzero(has_answers & (pairs.lengths > max_length).any(axis=1) & (cut[:, 0] == cut[:, 1]))
    halves = ((number, *pairs.halves(number)) for number in candidates.tolist())
    return [number for number, (own, _), (other, _) in halves if np.array_equal(own[:max_length], other[:max_length])]
