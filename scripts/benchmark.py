r"""Benchmarks of this trainer beside others, on the same rows.

    python scripts/benchmark.py data \
        --tokenizer outputs/smollm2-135m-instruct --json data.json
    python scripts/benchmark.py start --json start.json --plot start.png
    python scripts/benchmark.py train --json train.json
    python scripts/benchmark.py preference --json preference.json
    python scripts/benchmark.py saves --json saves.json
    python scripts/benchmark.py sysgen \
        --distilabel distilabel/bin/python --json sysgen.json

data: preparing rows for training (read, render, tokenize, label, pack) by TRL and by us, beside the bare tokenizers.

start: `--check`, the first step and a resume by the number of rows: seconds and memory of the complete commands.

train: the first ten minutes on a GPU: its ceilings and kernels, steps of a 7B with random weights by TRL with its
defaults and by us under several settings, memory against the plan, a profile.

preference: steps of DPO on pairs by TRL, padded, and by us, packed, with a tiny model.

saves: how long training stands still for a checkpoint, and how long until the checkpoint is complete.

sysgen: SYSGEN's four calls for each row, to a server that takes the same time for each, by distilabel and by us.

Each prints a table in Markdown and writes every measurement, with the machine and the package versions, as JSON.
"""

import os
from collections.abc import Sequence

from benchmarks import data, preference, saves, start, sysgen, training

from train.cli import CommandLine, exit_with, run_command
from train.warning_filters import filter_known_warnings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments`: default the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for benchmark in (data, start, training, preference, saves, sysgen):
        benchmark.add_to(commands)
    options = parser.parse_args(arguments)
    return run_command(lambda: options.run(options), "stopped")


if __name__ == "__main__":
    exit_with(main)
