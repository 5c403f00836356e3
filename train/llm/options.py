"""Command-line options about servers."""

import argparse

from train.cli import duration_seconds

WAIT_FOR_SERVER = 60.0
"""Seconds to wait for an unreachable server at the start of a run."""


def add_wait_for_server(options: argparse._ActionsContainer, unless: str = "") -> None:
    """Add --wait-for-server, in seconds. `unless`: exceptions from the default, for the help."""
    options.add_argument(
        "--wait-for-server",
        type=duration_seconds,
        default=WAIT_FOR_SERVER,
        metavar="TIME",
        help="how long to wait at the start for a server that can't be reached yet: seconds, or 10m, 1h30m "
        f"(default {WAIT_FOR_SERVER:.0f}s{unless}). Once reached, it is waited for without a limit",
    )
