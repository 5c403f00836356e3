"""Options of commands that ask servers."""

import argparse

from train.cli import duration_seconds

WAIT_FOR_SERVER = 60.0
"""Seconds that a server which can't be reached is waited for at the start of a run."""


def add_wait_for_server(options: argparse._ActionsContainer, unless: str = "") -> None:
    """Add --wait-for-server, in seconds. `unless`: where the default is another, for the help."""
    options.add_argument(
        "--wait-for-server",
        type=duration_seconds,
        default=WAIT_FOR_SERVER,
        metavar="TIME",
        help="how long a server that can't be reached yet is waited for at the start: seconds, or 10m, 1h30m "
        f"(default {WAIT_FOR_SERVER:.0f}s{unless}). Once reached, it is waited for without a limit",
    )
