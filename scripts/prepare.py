r"""Tokenize the data of a recipe before training, on a machine without GPUs and on all cores.

    python scripts/prepare.py \
        --recipe recipes/smollm2-135m/sft/quickstart.yaml data.processes=2

Tokens are cached in `data.cache_dir`, where training opens them. A second call, even at the same time, tokenizes
nothing twice and continues a killed one. Invalid rows are reported as in training. The exit codes are those of
train/sft.py.
"""

import os
import time
from pathlib import Path

from train.cli import CommandLine, exit_with, run_command
from train.formatting import duration
from train.preflight.missing_files import check_files_exist
from train.recipe import load_recipe
from train.warning_filters import filter_known_warnings


def run(recipe_file: Path, overrides: list[str]) -> None:
    """Prepare the data of the recipe and print a summary. Raises UserError."""
    recipe = load_recipe(recipe_file, overrides)
    check_files_exist(recipe, packages=False)  # training runs on another machine
    # Heavy imports wait until the recipe has been checked.
    from train.data.diagnostics import describe_dropped, describe_unread, find_data_warnings, find_dropped_rows
    from train.data.prepare import prepare
    from train.model.tokenizer import load_chat_tokenizer

    tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
    started = time.monotonic()
    data = prepare(recipe, tokenizer)
    seconds = time.monotonic() - started
    for cache in data.caches:
        print(f"{cache.source}: {'read from cache' if cache.hit else 'tokenized'} ({cache.how})")
        print(f"    {cache.folder}")
    for name, stats in data.stats.items():
        print(f"{name}: {stats.rows:,} {stats.unit}s, {stats.tokens:,} tokens, {stats.sequences:,} sequences")
    for outcome in find_dropped_rows(data, recipe.data):
        print(f"dropped rows: {describe_dropped(outcome)}")
    for line in describe_unread(data.unread):
        print(f"not read: {line}")
    for warning in find_data_warnings(data):
        print(f"warning: {warning}")
    print(f"ready after {duration(seconds)}")


def main() -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    parser.add_argument("--recipe", required=True, type=Path, metavar="FILE", help="recipe to train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    options = parser.parse_intermixed_args()
    return run_command(lambda: run(options.recipe, options.overrides), "stopped; the same command continues")


if __name__ == "__main__":
    exit_with(main)
