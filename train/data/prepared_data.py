"""Prepared data: the splits of a run, their statistics, and everything that a report says about the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.dataset import PackedDataset
from train.data.min_gain import GainFilter
from train.data.siblings import LeftOutRows
from train.data.sources.source import BadRow, BadRows
from train.data.stats import Overlap, Repeats


class ExampleRow(NamedTuple):
    """One row to look at: token ids and labels as they are trained, its place, whether it has a system message.

    `loss_weights`: the distinct loss weights of its trained tokens, in ascending order.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int64]
    place: str
    has_system: bool
    loss_weights: list[float]


@dataclass(frozen=True)
class PairStats:
    """Counts of a split of pairs.

    - `siblings`: pairs of two rows' answers; the others are pairs of one row.
    - `chosen_tokens`, `rejected_tokens`: trained tokens of all chosen and all rejected answers.
    - `chosen_longer`, `rejected_longer`: pairs whose chosen or rejected answer has more tokens than the other.
    - `contradictory`: pairs whose answers another pair has the other way round, under the same prompt.
    """

    siblings: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_longer: int
    rejected_longer: int
    contradictory: Repeats


@dataclass
class SplitStats:
    """Counts of one split.

    - `conversations`: those that could be tokenized, repeated as the weights say.
    - `rows`: rows trained. A template that rewrites history makes several rows of one conversation.
    - `rows_with_loss_weight`: those of which a part has a loss weight other than 1.
    - `tokens`, `trained_tokens`: after truncation. `overlong_tokens`: tokens lost because of data.max_length.
    - `lengths`: tokens of every row before truncation and dropping.
    - `overlong`: rows longer than data.max_length, by what happened to them: refused, dropped or truncated.
    - `same_when_cut`: pairs whose halves would be the same after truncation, which are dropped.
    - `documents_per_sequence`: rows in each sequence.
    - `examples`: a few rows to look at.
    - `capacity`: the tokens that a sequence can hold.
    - `pairs`: None unless the split is one of pairs. Then the counts of conversations and rows are those of pairs,
      tokens those of both halves, `lengths` those of the longer half, and `examples` has both halves of a few pairs.
    """

    conversations: int = 0
    rows: int = 0
    rows_with_system: int = 0
    distinct_systems: int = 0
    rows_with_loss_weight: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    longest_place: str = ""
    overlong: dict[str, BadRows] = field(default_factory=dict)
    overlong_tokens: int = 0
    same_when_cut: BadRows = field(default_factory=BadRows)
    documents_per_sequence: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    duplicates: Repeats = field(default_factory=Repeats)
    examples: list[ExampleRow] = field(default_factory=list)
    capacity: int = 0
    pairs: PairStats | None = None

    @property
    def unit(self) -> str:
        """The word for what is counted as a row."""
        return "pair" if self.pairs else "row"

    @property
    def sequences(self) -> int:
        """Number of sequences: packed rows, or single rows without packing."""
        return len(self.documents_per_sequence)

    @property
    def tokens_per_sequence(self) -> float:
        """Mean number of tokens in a sequence."""
        return self.tokens / max(self.sequences, 1)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row, before truncation."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True)
class Split:
    """The training or validation data."""

    dataset: PackedDataset
    stats: SplitStats


@dataclass(frozen=True, slots=True)
class CachedSource:
    """The cache entry that holds the tokens of one source.

    `hit`: it was in the cache already. `how`: the tokenizer that made the tokens. `tokens`: their counts and digest.
    """

    source: str
    key: str
    folder: str
    hit: bool
    how: str
    tokens: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UnreadText:
    """A column of a source, or a key of its messages, that no format reads.

    `key`: the source's key in the recipe. `rows`: rows that have it. `losing`: rows that lose content with it;
    `example`: the first of those. `ignored`: the recipe lists it under `ignore`.
    """

    key: str
    name: str
    rows: int
    losing: int
    ignored: bool
    example: BadRow | None = None


@dataclass(frozen=True)
class PreparedData:
    """All that training needs of the data.

    - `errors`: rows that can't be trained, by kind of error, of both splits.
    - `escaped`: number of rows in the sources in which control tokens typed in the text were broken up.
    - `skipped_files`: files in a source's folder whose names are not those of data.
    - `metadata_files`: files in a source's folder that describe the data and hold no rows.
    - `unread`: columns and message keys that no format reads.
    - `misspelled_ignores`: sentences about names in `ignore` that no row has, while a row has a similar one.
    - `unused_ignores`: sentences about names in `ignore` that no row has, nor a similar one.
    - `gain_filters`: the effect of `min_gain` of each source that has it.
    - `left_out`: rows of a source beyond its `siblings`, and rows without a sibling in preference training.
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
    gain_filters: Sequence[GainFilter] = ()
    left_out: Sequence[LeftOutRows] = ()

    @property
    def stats(self) -> dict[str, SplitStats]:
        """The statistics of each split that exists, by its name."""
        splits = {"training": self.train, "validation": self.validation}
        return {name: split.stats for name, split in splits.items() if split}
