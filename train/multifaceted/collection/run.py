"""Run of the collection: instructions through the pipeline into rows, pairs, statistics and a report."""

from collections.abc import AsyncGenerator

from train.datagen.language import load_language_detector
from train.datagen.run import RunResult, open_near_duplicate_filter, run_generation
from train.llm.client import Client
from train.llm.options import WAIT_FOR_SERVER
from train.llm.ordered_map import map_ordered
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.hierarchy import PreferencePlan, load_hierarchy
from train.multifaceted.collection.instructions import iter_instructions
from train.multifaceted.collection.pipeline import Pipeline
from train.multifaceted.collection.pressure_rows import further_instruction
from train.multifaceted.collection.report import write_report
from train.multifaceted.collection.result import InstructionResult
from train.multifaceted.collection.stats import CollectionStats
from train.multifaceted.collection.writer import OUTPUTS, CollectionWriter
from train.pressure.generated import with_further


def run(config: CollectionConfig, wait_for_server: float = WAIT_FOR_SERVER) -> RunResult[CollectionStats]:
    """Build the collection from all source rows; see `run_generation`. Raises UserError."""
    hierarchy = load_hierarchy(config.hierarchy.file, ours=config.hierarchy.ours)
    plan = PreferencePlan(hierarchy, config.sets_per_instruction, config.seed)
    stats = CollectionStats(config, hierarchy)

    def generate(client: Client) -> AsyncGenerator[InstructionResult]:
        if config.pressure.is_on:
            load_language_detector()
        pipeline = Pipeline(config, client, hierarchy, plan)
        instructions = iter_instructions(config.data, config.filter, near_duplicates)
        # Twice the servers' concurrency, as in SYSGEN: requests stay in flight while other rows are between two stages.
        rows = with_further(instructions, further_instruction, config.seed)
        return map_ordered(rows, lambda row: pipeline.run(*row), at_once=2 * client.concurrency)

    def record(result: InstructionResult, writer: CollectionWriter) -> None:
        stats.add(result, pairs=writer.write_result(result))

    with open_near_duplicate_filter(config.filter.near_duplicates) as near_duplicates:
        return run_generation(
            config,
            stats,
            open_writer=lambda: CollectionWriter(config),
            outputs=OUTPUTS,
            generate=generate,
            record=record,
            write_report=write_report,
            wait_for_server=wait_for_server,
        )
