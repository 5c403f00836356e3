r"""Measure what a model has learnt.

    python scripts/evaluate.py gain \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --model outputs/smollm2-135m-quickstart

    python scripts/evaluate.py compare outputs/smollm2-135m-instruct \
        outputs/smollm2-135m-quickstart

Each command has its own --help, with an example. Results go into the folder of the model. What was answered or scored
is kept, so the same command continues a run that was stopped.
"""

import os
import sys
from pathlib import Path

# Python puts the folder of the started file first on the import path. Leave it out: `import evaluate` must find Hugging
# Face's package, which tasks of lm-evaluation-harness use, and not this file.
HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):
    sys.path[0] = str(HERE.parent)

try:
    from train.cli import CommandLine, run_command
    from train.evaluation import bench, compare_command, gain, harness_command, rules
    from train.evaluation.ifeval import command as ifeval
    from train.warning_filters import filter_known_warnings
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def main() -> int:
    """Run the command; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (rules, gain, ifeval, bench, harness_command, compare_command):
        command.add_to(commands)
    options = parser.parse_args()
    return run_command(
        lambda: options.run(options),
        "stopped; answers and scores so far are kept: the same command continues",
    )


if __name__ == "__main__":
    sys.exit(main())
