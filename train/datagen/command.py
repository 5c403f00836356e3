"""What scripts that have a model write data share: their options, their exit codes, and the last lines they print."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.cli import CommandLine, run_command
from train.datagen.drop_reasons import about_losses, unaccepted
from train.errors import UserError
from train.formatting import duration
from train.llm.failures import NO_ANSWER
from train.llm.options import WAIT_FOR_SERVER, add_wait_for_server
from train.llm.reasoning.answer import format_advice
from train.llm.server_errors import is_about_length
from train.llm.startup_check import check_servers


def main(
    description: str | None,
    load_config: Callable[[Path, Sequence[str]], Any],
    check: Callable[[Any], None],
    run: Callable[[Any, float], Any],
    tell: Callable[[Any, str], None],
    lost: Callable[[Any], Mapping[str, int]],
    asked_stages: Callable[[Any], Sequence[str]],
) -> int:
    """Run the command; the exit code.

    `run` takes the configuration and the seconds for which an unreachable server is waited for at the start. `tell`:
    print what the tally of a run says, given the time it took. `lost`: how often each reason left something out; what
    servers said where no answer came is in the tally's `unanswered` (see `train.llm.failures`). `asked_stages`: the
    sections of the stages that a run asks for.

    A run ends with an `error:` and exit code 2 where it lost rows for a reason that no setting accepts (see
    `train.datagen.drop_reasons`), and where it wrote no row, whatever left them out: who trains on it next would be told of an
    empty file and not why it is empty.
    """
    parser = CommandLine(description=description)
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="the configuration, a YAML file: see recipes/"
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
            servers = [server.server() for server in config.servers]
            stages = {stage: getattr(config, stage).decoding() for stage in asked_stages(config)}
            if stages:
                asyncio.run(check_servers(servers, config.model, wait=options.wait_for_server or 0.0, stages=stages))
            return
        done = run(config, WAIT_FOR_SERVER if options.wait_for_server is None else options.wait_for_server)
        tell(done.tally, duration(time.monotonic() - started))
        unanswered = done.tally.unanswered.lines()
        for line in unanswered:
            print(f"{NO_ANSWER}, {line}")
        counts = done.counts
        if counts.advice:
            print(counts.advice)
        print(
            f"{counts.answered:,} answers ({counts.from_journal:,} from the journal), "
            f"{counts.retries:,} tries repeated"
            + (f", {counts.reasoned:,} with reasoning in a field of its own" if counts.reasoned else "")
            + (f", {counts.with_ignored_parts:,} with parts that are no text" if counts.with_ignored_parts else "")
        )
        print(f"read {done.report}")
        for warning in (*format_advice(done.tally.events), *done.tally.warnings(), *counts.bad_servers):
            print(f"warning: {warning}")
        left_out, reasons = done.report.with_name("left_out.jsonl"), lost(done.tally)
        if not done.tally.written:
            why = f"Why no answer came, {'; '.join(unanswered).rstrip('.')}. " if unanswered else ""
            why += f"{counts.advice} " if counts.advice else ""
            raise UserError(
                f"no row was written: {went(done.tally.rows, reasons)}. {why}Each is in {left_out}, and {done.report} "
                f"says more. {_ADVICE[any(map(is_about_length, done.tally.unanswered.counts()))]}, and start the same "
                "command again."
            )
        if losses := unaccepted(reasons, config.accept_losses):
            raise UserError(about_losses(losses, config.accept_losses, left_out))

    return run_command(act, "stopped; what was answered is in the journal, and the same command goes on from here")


_ADVICE = {
    False: "Change the data or the settings that left them out",
    True: "Serve the model with a longer context, lower `max_tokens` of the stages, or take shorter rows",
}
"""Advice for requests that the server calls too long, and for others."""


def went(rows: int, reasons: Mapping[str, int]) -> str:
    """Where the rows went of which none is left (a source without any is an error of its own)."""
    return f"all {rows:,} were left out ({'; '.join(f'{count:,}: {reason}' for reason, count in reasons.items())})"
