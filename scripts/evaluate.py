r"""Evaluate a model: how well it follows its system messages, and benchmarks.

    python scripts/evaluate.py gain \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --model outputs/smollm2-135m-quickstart

    python scripts/evaluate.py compare outputs/smollm2-135m-instruct \
        outputs/smollm2-135m-quickstart

Each command has its own --help, with an example. Results go into the folder of the model. Answers and scores are kept,
so the same command continues a run that was stopped.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Python puts the folder of the started file first on the import path. Leave it out: `import evaluate` must find Hugging
# Face's package, which tasks of lm-evaluation-harness use, and not this file.
HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):
    sys.path[0] = str(HERE.parent)

try:
    from train.cli import CommandLine, exit_with, run_command
    from train.evaluation import bench, compare, gain, harness, rules
    from train.evaluation.hierarchy import command as hierarchy
    from train.evaluation.ifeval import command as ifeval
    from train.evaluation.turns import command as turns
    from train.warning_filters import filter_known_warnings
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments`: default the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (rules, gain, ifeval, hierarchy, turns, bench, harness, compare):
        command.add_to(commands)
    options = parser.parse_args(arguments)
    return run_command(
        lambda: options.run(options),
        "stopped; answers and scores so far are kept: the same command continues",
    )


if __name__ == "__main__":
    exit_with(main)
