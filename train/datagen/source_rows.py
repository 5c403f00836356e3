"""Rows of any source one by one, for those who ask a model about each."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import Field

from train.data.sources.formats import Conversation, RowError
from train.data.sources.source import count_rows, open_source, read_conversations
from train.errors import UserError
from train.recipe import Section, Sources

PlacedRow = tuple[int, str, Conversation | RowError]
"""A row's number, its place, and the row or why it can't be read."""


class SourcesSection(Section):
    """The rows that get system messages."""

    sources: Sources
    """Where they come from, as in a training recipe. `weight` isn't read: every row is taken once."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many rows from the start of the sources, to look at before the whole; null = all."""
    allow_pickle: bool = False
    """Open data in pickle files, which can run code as they are opened."""


def iter_rows(data: SourcesSection) -> Iterator[PlacedRow]:
    """Every row of the sources with its number and place, up to the limit. Raises UserError."""
    rows = (row for source in data.sources for row in read_conversations(source, data.allow_pickle))
    for index, (place, row) in enumerate(islice(rows, data.limit)):
        yield index, place, row


def number_of_rows(data: SourcesSection) -> int:
    """How many rows there are, up to the limit. Raises UserError."""
    total = 0
    for source in data.sources:
        total += count_rows(source, data.allow_pickle)
        if data.limit is not None and total >= data.limit:
            return data.limit
    return total


def refuse_own_files(data: SourcesSection, own: Sequence[Path]) -> None:
    """Raise UserError where a source reads what stands below one of `own`: a run that reads what it writes would write
    over rows that are nowhere else."""
    for source in data.sources:
        for name in open_source(source, data.allow_pickle).files:
            path = Path(name).resolve()
            if any(path.is_relative_to(one.resolve()) for one in own):
                raise UserError(
                    f"{source.path}: {name} is in the output_dir of this very run, which would write over it: name "
                    "another output_dir."
                )
