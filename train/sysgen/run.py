"""SYSGEN run: source rows through the pipeline into files, statistics and a report."""

from collections.abc import AsyncGenerator

from train.datagen.language import load_language_detector
from train.datagen.run import RunResult, open_near_duplicate_filter, run_generation
from train.datagen.source_rows import iter_rows
from train.llm.client import Client
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.pressure.generated import with_further
from train.sysgen.config import SysgenConfig
from train.sysgen.pipeline import Pipeline
from train.sysgen.pressure_rows import further_exchange
from train.sysgen.report import write_report
from train.sysgen.result import RowResult
from train.sysgen.stats import SysgenStats
from train.sysgen.tag_balance import LAG, TagBalance
from train.sysgen.writer import OUTPUTS, SysgenWriter


def run(config: SysgenConfig, wait_for_server: float = WAIT_FOR_SERVER) -> RunResult[SysgenStats]:
    """Run SYSGEN over all source rows; see `run_generation`. Raises UserError."""
    stats, balance = SysgenStats(config), TagBalance(config)

    def generate(client: Client) -> AsyncGenerator[RowResult]:
        if config.gates.language or config.constraints.share or config.pressure.is_on:
            load_language_detector()
        pipeline = Pipeline(config, client, balance)
        at_once = min(2 * client.concurrency, LAG // 2)
        rows = with_further(iter_rows(config.data), further_exchange, config.seed)
        return map_ordered(rows, lambda row: pipeline.run(*row), at_once=at_once, ahead=min(32 * at_once, LAG - 1))

    def record(result: RowResult, writer: SysgenWriter) -> None:
        if messages and _has_generated_message(result) and messages.is_near_duplicate(result.system):
            result.drop("gate: nearly the system message of a row before")
        balance.add(result)
        stats.add(result)
        writer.write_result(result)

    with open_near_duplicate_filter(config.gates.near_duplicates) as messages:
        return run_generation(
            config,
            stats,
            open_writer=lambda: SysgenWriter(config),
            outputs=OUTPUTS,
            generate=generate,
            record=record,
            write_report=write_report,
            wait_for_server=wait_for_server,
        )


def _has_generated_message(result: RowResult) -> bool:
    """Return whether a row is written with a system message by the model."""
    return result.reason is None and bool(result.message.phrases)
