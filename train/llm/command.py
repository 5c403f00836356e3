"""What scripts that have a model write data share: their options, their exit codes, and the last lines they print."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.errors import CommandLine, ending
from train.progress import duration


def main(
    description: str | None,
    load_config: Callable[[Path, Sequence[str]], Any],
    check: Callable[[Any], None],
    run: Callable[[Any], Any],
    tell: Callable[[Any, str], None],
) -> int:
    """Run the command; the exit code. `tell`: print what the tally of a run says, given the time it took."""
    parser = CommandLine(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="what is to be done: see recipes/")
    parser.add_argument("--check", action="store_true", help="read the configuration and the rows, and ask nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the configuration by dotted key")
    options = parser.parse_intermixed_args()
    started = time.monotonic()

    def act() -> None:
        config = load_config(options.config, options.overrides)
        if options.check:
            check(config)
            return
        done = run(config)
        tell(done.tally, duration(time.monotonic() - started))
        counts = done.counts
        print(
            f"{counts.answered:,} answers ({counts.from_journal:,} from the journal), "
            f"{counts.tries_failed:,} tries repeated"
        )
        print(f"read {done.report}")

    return ending(act, "stopped; what was answered is in the journal, and the same command goes on from here")
