"""Source rows: the rows of any data source, one at a time, for a pipeline that asks a model about each."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pydantic import Field

from train.data.sources.formats import Conversation, RowError
from train.data.sources.source import count_rows, open_source, read_conversations
from train.errors import UserError
from train.recipe import Section, Sources

NumberedRow = tuple[int, str, Conversation | RowError]
"""Number of a row in all sources (from 0), its place (`data.jsonl:12`), and its conversation or reading error."""


class SourcesSection(Section):
    """The source rows."""

    sources: Sources
    """Data sources, as in a training recipe. `weight` is ignored: every row is used once."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many rows from the start of the sources, for a trial run; null = all."""
    allow_pickle: bool = False
    """Open data in pickle files, which can run code as they are opened."""


def iter_rows(data: SourcesSection) -> Iterator[NumberedRow]:
    """Yield every row of the sources, up to the limit. Raises UserError."""
    rows = (row for source in data.sources for row in read_conversations(source, data.allow_pickle))
    for index, (place, row) in enumerate(islice(rows, data.limit)):
        yield index, place, row


def count_source_rows(data: SourcesSection) -> int:
    """Count the rows of the sources, up to the limit. Raises UserError."""
    total = 0
    for source in data.sources:
        total += count_rows(source, data.allow_pickle)
        if data.limit is not None and total >= data.limit:
            return data.limit
    return total


def refuse_own_files(data: SourcesSection, outputs: Iterable[Path]) -> None:
    """Raise UserError if a source reads a file that the run would overwrite: one of `outputs` or a file below it."""
    outputs = [path.resolve() for path in outputs]
    for source in data.sources:
        for name in open_source(source, data.allow_pickle).files:
            if any(Path(name).resolve().is_relative_to(output) for output in outputs):
                raise UserError(
                    f"{source.path}: {name} is in the output_dir of this run, which would overwrite it: name another "
                    "output_dir."
                )
