"""Run of a generation command: source rows through a pipeline into files, statistics and a report."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from train.datagen.config import GenerationConfig
from train.datagen.dataset_writer import DatasetWriter
from train.datagen.deduplication import NearDuplicateFilter
from train.datagen.source_rows import count_source_rows, refuse_own_files
from train.datagen.stats import RunStats
from train.errors import UserError
from train.llm.client import Client, Counts
from train.llm.journal import Journal
from train.llm.progress import progress

JOURNAL = "answers.sqlite"

Stats = TypeVar("Stats", bound=RunStats)
Writer = TypeVar("Writer", bound=DatasetWriter)


@dataclass(frozen=True)
class RunResult(Generic[Stats]):
    """A finished run: statistics of all rows, counts of the requests of this start, and the path of report.md."""

    stats: Stats
    counts: Counts
    report: Path


def run_generation(
    config: GenerationConfig,
    stats: Stats,
    *,
    open_writer: Callable[[], Writer],
    outputs: Iterable[str],
    generate: Callable[[Client], AsyncGenerator[Any]],
    record: Callable[[Any, Writer], None],
    write_report: Callable[[Path, Any, float | None], Path],
    wait_for_server: float,
) -> RunResult[Stats]:
    """Run a pipeline over all source rows; write the rows and the report.

    An interrupted run continues with the next call, which repeats no request that was answered: the journal holds the
    answers, and the rows are made from it again.

    Args:
        config: the configuration.
        stats: statistics that `record` fills.
        open_writer: opens the files of rows, once the journal is locked.
        outputs: names of what the writer writes in `output_dir`; a source among them is an error.
        generate: yields the results in the order of the source rows.
        record: counts and writes one result.
        write_report: takes the folder, the facts and the seconds from the first request to the last answer.
        wait_for_server: see `Client`.

    Raises UserError.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} can't be created: {error.strerror}.") from error
    refuse_own_files(config.data, (folder / name for name in outputs))
    total = count_source_rows(config.data)
    servers = [server.server() for server in config.servers]

    async def process(journal: Journal, writer: Writer) -> Counts:
        async with (
            Client(servers, config.model, journal, wait_for_server=wait_for_server) as client,
            progress("rows", total, client) as rows_done,
            aclosing(generate(client)) as results,
        ):
            async for result in results:
                record(result, writer)
                rows_done.advance()
        return client.counts

    with Journal(folder / JOURNAL) as journal, open_writer() as writer:
        counts = asyncio.run(process(journal, writer))
        writer.finish()
        try:
            return RunResult(stats, counts, write_report(folder, stats.facts(), journal.seconds()))
        except OSError as error:
            raise UserError(
                f"output_dir: the report can't be written to {folder}: {error.strerror}. The rows are complete: free "
                "some space, and start the same command again."
            ) from error


def open_near_duplicate_filter(threshold: float | None) -> AbstractContextManager[NearDuplicateFilter | None]:
    """Return a near-duplicate filter for a `with` block; None in its place if `threshold` is None."""
    return nullcontext() if threshold is None else NearDuplicateFilter(threshold)
