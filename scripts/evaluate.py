"""Measure what a model has learnt.

    python scripts/evaluate.py rules --rules recipes/smollm2-135m/data/rules.py \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct --after outputs/smollm2-135m-quickstart

rules: how often each model obeys system messages whose rules a program can check. Writes the answers to answers.jsonl,
the figures to adherence.json and adherence.png, and a section into report.md, all in the folder of the second model.

    python scripts/evaluate.py gain --model outputs/smollm2-135m-quickstart --before outputs/smollm2-135m-instruct \
        --data recipes/smollm2-135m/data/held_out.jsonl

gain: how much likelier each model finds a reference answer under its own system message than under others, with 95 %
intervals; train/loop/system_gain.py says what it can't see. Writes gain.json, gain.png and a section into report.md;
what was scored stands in gain_scores.jsonl, so that a killed run goes on.

    python scripts/evaluate.py bench --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/bench.jsonl --judge Qwen/Qwen2.5-14B-Instruct --judge-server http://localhost:8000/v1

bench: answers to Multifaceted Bench (the hub's without --data), graded by a judge as the JANUS paper does it;
train/multifaceted/bench.py says what is averaged. Writes bench.json, bench_rows.jsonl, bench.png and a section into
report.md; every answer goes into bench.sqlite, so the same command goes on where it was stopped.

    python scripts/evaluate.py ifeval --model outputs/smollm2-135m-quickstart \
        --data recipes/smollm2-135m/data/system_ifeval.jsonl \
        --control recipes/smollm2-135m/data/system_ifeval_user.jsonl

ifeval: how many of the constraints in a system message an answer follows, by lm-evaluation-harness's own checkers, and
how many it follows where they stand in the user turn. Writes ifeval.json, ifeval_answers.jsonl, ifeval.png and a
section into report.md; what was answered stays in ifeval.sqlite, and the same command goes on from there.

    python scripts/evaluate.py harness --model outputs/smollm2-135m-quickstart --tasks sysgen

harness: tasks of lm-evaluation-harness with the trained chat template; `sysgen` is the eight unseen benchmarks of
SYSGEN. Writes harness.json, harness_rows.jsonl and a section into report.md.

    python scripts/evaluate.py compare outputs/smollm2-135m-instruct outputs/smollm2-135m-quickstart

compare: what two folders hold of all these results, side by side. Writes compare.json and compare.png.
"""

import argparse
import os
import sys

import evaluate_bench
import evaluate_compare
import evaluate_gain
import evaluate_harness
import evaluate_ifeval
import evaluate_rules

from train.errors import CommandLine, ending
from train.loop.noise import leave_out_unhelpful_warnings


def main() -> int:
    """Run the command; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    leave_out_unhelpful_warnings()
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (
        evaluate_rules,
        evaluate_gain,
        evaluate_ifeval,
        evaluate_bench,
        evaluate_harness,
        evaluate_compare,
    ):
        command.add_to(commands)
    options = parser.parse_args()
    return ending(
        lambda: options.run(options),
        stopped="stopped; what was answered or scored is kept, and the same command goes on from here",
    )


if __name__ == "__main__":
    sys.exit(main())
