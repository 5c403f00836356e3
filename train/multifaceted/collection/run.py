"""TODO: train.multifaceted.collection.run.run."""

import asyncio
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from train.datagen.deduplication import NearDuplicateFilter
from train.datagen.source_rows import count_source_rows, refuse_own_files
from train.errors import UserError
from train.llm.client import Client, Counts
from train.llm.journal import Journal
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.hierarchy import Hierarchy, PreferencePlan, load_hierarchy
from train.multifaceted.collection.instructions import instructions
from train.multifaceted.collection.pipeline import Pipeline
from train.multifaceted.collection.report import write_report
from train.multifaceted.collection.stats import CollectionStats
from train.multifaceted.collection.writer import DATA, LEFT_OUT, PAIRS, CollectionWriter

JOURNAL = "answers.sqlite"


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end: what the instructions became, what this start asked, and where to read of it."""

    stats: CollectionStats
    counts: Counts
    report: Path


def run(config: CollectionConfig, wait_for_server: float = WAIT_FOR_SERVER) -> RunResult:
    """Take all instructions through the pipeline, write rows, pairs and the report. Raises UserError.

    What is interrupted at any moment is made good by the next call, which asks nothing again that was answered.
    `wait_for_server`: as of `Client`.
    """
    hierarchy = load_hierarchy(config.hierarchy.file, ours=config.hierarchy.ours)
    plan = PreferencePlan(hierarchy, config.sets_per_instruction, config.seed)
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} can't be made: {error.strerror}.") from error
    refuse_own_files(config.data, (folder / DATA, folder / PAIRS, folder / LEFT_OUT))
    total = count_source_rows(config.data)
    with Journal(folder / JOURNAL) as journal, CollectionWriter(config) as output:
        stats = CollectionStats(config, hierarchy)
        counts = asyncio.run(_run(config, hierarchy, plan, journal, output, stats, total, wait_for_server))
        try:
            return RunResult(stats, counts, write_report(folder, stats.facts(), journal.seconds()))
        except OSError as error:
            raise UserError(
                f"output_dir: the report can't be written to {folder}: {error.strerror}. The rows are there: make "
                "room, and start the same command again."
            ) from error


async def _run(
    config: CollectionConfig,
    hierarchy: Hierarchy,
    plan: PreferencePlan,
    journal: Journal,
    output: CollectionWriter,
    stats: CollectionStats,
    total: int,
    wait_for_server: float,
) -> Counts:
    threshold = config.filter.near_duplicates
    servers = [server.server() for server in config.servers]
    with nullcontext() if threshold is None else NearDuplicateFilter(threshold) as near:
        async with (
            Client(servers, config.model, journal, wait_for_server=wait_for_server) as client,
            progress("rows", total, client) as pace,
        ):
            pipeline = Pipeline(config, client, hierarchy, plan)
            rows = instructions(config.data, config.filter, near)
            # Twice as many as the servers take at once, as in SYSGEN: while one is between two steps, another asks.
            async with aclosing(map_ordered(rows, pipeline.run, at_once=2 * client.concurrency)) as results:
                async for result in results:
                    stats.add(result, pairs=output.write(result))
                    pace.advance()
    output.finish()
    return client.counts
