"""One run: rows from the sources through the pipeline into files, counted for the report."""

import asyncio
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from train.datagen.deduplication import NearDuplicateFilter
from train.datagen.source_rows import count_source_rows, iter_rows, refuse_own_files
from train.errors import UserError
from train.llm.client import Client, Counts
from train.llm.journal import Journal
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.sysgen.config import SysgenConfig
from train.sysgen.filters import load_language_detector
from train.sysgen.pipeline import Pipeline
from train.sysgen.report import write_report
from train.sysgen.result import RowResult
from train.sysgen.stats import SysgenStats
from train.sysgen.tag_balance import LAG, TagBalance
from train.sysgen.writer import SysgenWriter

JOURNAL = "answers.sqlite"


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end: what the rows became, what this start asked, and where to read of it."""

    stats: SysgenStats
    counts: Counts
    report: Path


def run(config: SysgenConfig, wait_for_server: float = WAIT_FOR_SERVER) -> RunResult:
    """Take all rows through the pipeline, write them and the report. Raises UserError.

    What is interrupted at any moment is made good by the next call, which asks nothing again that was answered.
    `wait_for_server`: as of `Client`.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} can't be made: {error.strerror}.") from error
    refuse_own_files(config.data, (folder / "data", folder / "left_out.jsonl"))
    total = count_source_rows(config.data)
    with Journal(folder / JOURNAL) as journal, SysgenWriter(folder, config.output, config.model) as output:
        stats = SysgenStats(config)
        counts = asyncio.run(_run(config, journal, output, stats, total, wait_for_server))
        try:
            return RunResult(stats, counts, write_report(folder, stats.facts(), journal.seconds()))
        except OSError as error:
            raise UserError(
                f"output_dir: the report can't be written to {folder}: {error.strerror}. The rows are there: make "
                "room, and start the same command again."
            ) from error


async def _run(
    config: SysgenConfig, journal: Journal, output: SysgenWriter, stats: SysgenStats, total: int, wait_for_server: float
) -> Counts:
    if config.gates.language or config.constraints.share:
        load_language_detector()
    balance = TagBalance(config)
    threshold = config.gates.near_duplicates
    servers = [server.server() for server in config.servers]
    with nullcontext() if threshold is None else NearDuplicateFilter(threshold) as messages:
        async with (
            Client(servers, config.model, journal, wait_for_server=wait_for_server) as client,
            progress("rows", total, client) as pace,
        ):
            pipeline = Pipeline(config, client, balance)
            at_once = min(2 * client.concurrency, LAG // 2)
            rows = map_ordered(iter_rows(config.data), pipeline.run, at_once=at_once, ahead=min(32 * at_once, LAG - 1))
            async with aclosing(rows) as results:
                async for result in results:
                    if messages and _is_ours(result) and messages.is_near_duplicate(result.system):
                        result.leave_out("gate: nearly the system message of a row before")
                    balance.settle(result)
                    stats.add(result)
                    output.write(result)
                    pace.advance()
    output.finish()
    return client.counts


def _is_ours(result: RowResult) -> bool:
    """Whether it is written with a system message that the model wrote."""
    return result.reason is None and bool(result.message.phrases)
