"""Command of a generation run: options, exit codes and the last lines of output."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.cli import CommandLine, run_command
from train.datagen.config import GenerationConfig
from train.datagen.dataset_writer import LEFT_OUT
from train.datagen.drop_reasons import find_unaccepted_losses, format_drop_reasons, format_loss_error
from train.datagen.run import RunResult
from train.errors import UserError
from train.formatting import duration
from train.llm.client import Counts
from train.llm.failures import NO_ANSWER
from train.llm.options import WAIT_FOR_SERVER, add_wait_for_server
from train.llm.reasoning import format_advice
from train.llm.server_errors import is_about_length
from train.llm.startup_check import check_servers

Config = TypeVar("Config", bound=GenerationConfig)


def main(
    description: str | None,
    load_config: Callable[[Path, Sequence[str]], Config],
    check: Callable[[Config], None],
    run: Callable[[Config, float], RunResult[Any]],
) -> int:
    """Run the command and return its exit code.

    Exit code 2 and an `error:` also end a run that wrote no row, and one with losses outside `accept_losses`.

    Args:
        description: text of --help.
        load_config: takes the configuration's path and the overrides.
        check: prints what a run would do.
        run: takes the configuration and the seconds to wait for an unreachable server.
    """
    parser = CommandLine(description=description)
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="configuration, a YAML file (see recipes/)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read the configuration and all rows, and ask each server for one token with the settings of each stage",
    )
    add_wait_for_server(parser, ", with --check 0s")
    parser.set_defaults(wait_for_server=None)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the configuration")
    options = parser.parse_intermixed_args()
    started = time.monotonic()

    def act() -> None:
        config = load_config(options.config, options.overrides)
        if options.check:
            check(config)
            _check_servers(config, options.wait_for_server or 0.0)
            return
        result = run(config, WAIT_FOR_SERVER if options.wait_for_server is None else options.wait_for_server)
        _print_result(result, duration(time.monotonic() - started))
        _check_losses(config, result)

    return run_command(act, "stopped; the answers so far are in the journal, and the same command continues from here")


def _check_servers(config: GenerationConfig, wait: float) -> None:
    servers = [server.server() for server in config.servers]
    if stages := {stage: config.stage(stage).decoding() for stage in config.used_stages()}:
        asyncio.run(check_servers(servers, config.model, wait=wait, stages=stages))


def _print_result(result: RunResult[Any], time: str) -> None:
    stats, counts = result.stats, result.counts
    lines = [*stats.summary(time), *(f"{NO_ANSWER}, {line}" for line in stats.unanswered.lines())]
    if counts.advice:
        lines.append(counts.advice)
    lines += [_format_counts(counts), f"read {result.report}"]
    warnings = (*format_advice(stats.events), *stats.warnings(), *counts.bad_servers)
    print(*lines, *(f"warning: {warning}" for warning in warnings), sep="\n")


def _format_counts(counts: Counts) -> str:
    parts = [f"{counts.answered:,} answers ({counts.from_journal:,} from the journal)", f"{counts.retries:,} retries"]
    if counts.reasoned:
        parts.append(f"{counts.reasoned:,} with reasoning in a field of its own")
    if counts.with_ignored_parts:
        parts.append(f"{counts.with_ignored_parts:,} with parts other than text, which were ignored")
    return ", ".join(parts)


def _check_losses(config: GenerationConfig, result: RunResult[Any]) -> None:
    """Raise UserError if no row was written, or rows were lost for reasons that the configuration does not accept."""
    stats, reasons = result.stats, result.stats.drop_reasons()
    left_out = result.report.with_name(LEFT_OUT)
    if not stats.written:
        failures = stats.unanswered.lines()
        details = [f"Errors of the server: {'; '.join(failures).rstrip('.')}."] if failures else []
        details += [result.counts.advice] if result.counts.advice else []
        advice = _ADVICE[any(map(is_about_length, stats.unanswered.counts()))]
        raise UserError(
            " ".join((f"no row was written: {format_drop_reasons(stats.rows, reasons)}.", *details))
            + f" The dropped rows are in {left_out}; {result.report} says more. {advice}, and start the same command "
            "again."
        )
    if losses := find_unaccepted_losses(reasons, config.accept_losses):
        raise UserError(format_loss_error(losses, config.accept_losses, left_out))


_ADVICE = {
    False: "Change the data or the settings that dropped them",
    True: "Serve the model with a longer context, lower `max_tokens` of the stages, or use shorter rows",
}
"""Advice if the server calls some requests too long, and otherwise."""
