"""Train the quickstart with several seeds, measure each model, and print the figures before and after in one table.

    python recipes/smollm2-135m/seeds.py --seeds 42 43 44

Start it in the root of the repository. The recipe's own seed trains in the recipe's output_dir, seed N in
`<output_dir>-seed-N`. A recipe of preference training starts from the quickstart's model of the same seed. Each folder
gets the results and the report of its model; `seeds.md` in output_dir gets the table. Finished runs are not trained
again and answers are kept, so the same command continues, and adds seeds.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from train.cli import CommandLine, exit_with, non_negative_int, run_command
from train.errors import UserError
from train.evaluation import compare, gain, rules
from train.evaluation.formatting import format_estimate
from train.evaluation.hierarchy import command as hierarchy
from train.evaluation.results import Results, read_before, read_results
from train.evaluation.turns import command as turns
from train.recipe import Recipe, load_recipe
from train.reporting.markdown import format_table
from train.storage.atomic_write import atomic_write, write_text
from train.warning_filters import filter_known_warnings

RECIPE = Path("recipes/smollm2-135m/sft/quickstart.yaml")
HELD_OUT = "recipes/smollm2-135m/data/held_out.jsonl"
MEASURES = {
    "held-out wordings obeyed": ("rules", "held-out wordings"),
    "rules never trained obeyed": ("rules", "rules never trained"),
    "no pressure: message held": ("hierarchy", "reference: held"),
    "conflict: message held": ("hierarchy", "conflict: held"),
    "permitted: granted, and message held": ("hierarchy", "permitted: held"),
    "permitted, harmless words": ("hierarchy", "permitted, harmless: held"),
    "permitted, a code to share": ("hierarchy", "permitted, shared: held"),
    "permitted, another form": ("hierarchy", "permitted, choice: held"),
    "five turns: message held in all": ("turns", "plain: holds in all 5 turns"),
    "five turns, push-back in the third: held in all": ("turns", "push-back: holds in all 5 turns"),
    "answers right": ("hierarchy", "reference: answered"),
}
"""Line of the table -> kind of results and its measure."""
LIMITS = ("--max-new-tokens", "48", "--batch-size", "52")
HIERARCHY = ("hierarchy", "--settings", "reference", "conflict", "permitted", "--rows", "52", "--dtype", "bfloat16")
TURNS = ("turns", "--conversations", "26", "--no-gain", "--dtype", "bfloat16")
SHARED_SCORES = ("rules.sqlite", "gain_scores.jsonl")
"""Answers and scores that `rules` and `gain` keep in the folder of the trained model, those of the model before too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments`: default the command line."""
    filter_known_warnings()
    parser = CommandLine(description=__doc__)
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[42], help="seeds to train (default 42)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe to train (default: the quickstart's)")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options), "stopped; the same command continues")


def run(options: argparse.Namespace) -> None:
    """Train, measure and write the table. Raises UserError."""
    recipe = load_recipe(options.recipe)
    seeds = [*dict.fromkeys(options.seeds)]
    folders = {seed: folder_of(recipe.output_dir, seed, recipe) for seed in seeds}
    start = recipe.model.name_or_path
    starts = {seed: folder_of(start, seed, recipe) if recipe.preference else Path(start) for seed in seeds}
    for before in dict.fromkeys(starts.values()):
        measure_pressure(before)
    for seed, folder in folders.items():
        before = starts[seed]
        train(options.recipe, seed, before, folder)
        keep_scores([before, *folders.values()], folder)
        evaluate("rules", "--data", HELD_OUT, "--before", before, "--after", folder, *LIMITS)
        evaluate("gain", "--data", HELD_OUT, "--before", before, "--model", folder, "--dtype", "bfloat16")
        measure_pressure(folder)
        evaluate("compare", before, folder)
    text = table(starts, folders)
    path = Path(recipe.output_dir, "seeds.md")
    with atomic_write(path) as [staged]:
        write_text(staged, text)
    print(f"\n{text}\ntable: {path}")


def folder_of(name: str, seed: int, recipe: Recipe) -> Path:
    """Return the folder of the model of a seed; `name`: that of the recipe's own seed."""
    return Path(name if seed == recipe.seed else f"{name}-seed-{seed}")


def train(recipe: Path, seed: int, before: Path, folder: Path) -> None:
    """Train the model of a seed from the model `before`, unless its run has finished. Raises UserError."""
    launch = ("accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", load_recipe(recipe).command)
    overrides = (f"seed={seed}", f"model.name_or_path={before}", f"output_dir={folder}")
    words = ["-m", *launch, "--recipe", str(recipe), *overrides]
    print(f"\n$ python {' '.join(words)}", flush=True)
    if subprocess.run([sys.executable, *words], check=False).returncode:
        raise UserError(f"seed {seed}: its training failed, see above")


def keep_scores(folders: Iterable[Path], folder: Path) -> None:
    """Copy answers and scores of the model before training from another folder, so that it is measured once."""
    for name in SHARED_SCORES:
        source = next((other / name for other in folders if (other / name).is_file()), None)
        if source and not (folder / name).exists():
            shutil.copy(source, folder / name)


def measure_pressure(model: Path) -> None:
    """Measure whether a model holds its message against users, and over several turns."""
    evaluate(*HIERARCHY, *LIMITS, "--model", model)
    evaluate(*TURNS, *LIMITS, "--model", model)


def evaluate(*arguments: str | Path) -> None:
    """Run a command of evaluate.py in this process. Raises UserError."""
    words = [*map(str, arguments)]
    print(f"\n$ python scripts/evaluate.py {' '.join(words)}", flush=True)
    parser = CommandLine()
    commands = parser.add_subparsers()
    for command in (rules, gain, hierarchy, turns, compare):
        command.add_to(commands)
    options = parser.parse_args(words)
    options.run(options)


def table(starts: Mapping[int, Path], folders: Mapping[int, Path]) -> str:
    """Return the figures before and after training, mean [minimum, maximum] over the seeds, and the paired change."""
    after = [read_results(folder) for folder in folders.values()]
    before = [read_before(of_seed, start)[0] for of_seed, start in zip(after, starts.values(), strict=True)]
    compared = compare.compare_results(join_seeds(before), join_seeds(after))
    changes = {(pair.kind, pair.name): pair.difference for pair in compared.pairs}
    rows = []
    for line, (kind, name) in MEASURES.items():
        shares = [[value(results, kind, name) for results in side] for side in (before, after)]
        change = changes[kind, name]
        assert change is not None  # all of these measures keep their rows
        interval = format_estimate(change.mean, change.low, change.high, scale=100, digits=1, sign="+")
        rows.append((line, *map(format_spread, shares), interval, f"{change.p:.4f}"))
    seeds = ", ".join(map(str, folders))
    heads = ("", "before", "after", "change, points", "p")
    return format_table(heads, rows) + f"\n\nSeeds: {seeds}.\n"


def join_seeds(results: Sequence[Mapping[str, Results]]) -> dict[str, Results]:
    """Return the results of several models as those of one: each row has the numbers of all."""
    joined = {}
    for kind in {kind for kind, _ in MEASURES.values()}:
        of_kind = [of_seed[kind] for of_seed in results]
        measures = {}
        for name in (name for other, name in MEASURES.values() if other == kind):
            first, *others = (of_seed.measures[name] for of_seed in of_kind)
            rows = {row: sum((other.rows[row] for other in others), numbers) for row, numbers in first.rows.items()}
            measures[name] = replace(first, rows=rows)
        joined[kind] = replace(of_kind[0], measures=measures)
    return joined


def format_spread(shares: Sequence[float]) -> str:
    """Return the mean [minimum, maximum] in percent, or the figure that all have."""
    low, high = min(shares), max(shares)
    mean = f"{sum(shares) / len(shares):.1%}"
    return mean if low == high else f"{mean} [{low:.1%}, {high:.1%}]"


def value(results: dict[str, Results], kind: str, name: str) -> float:
    """Return the value of a measure."""
    return results[kind].measures[name].value


if __name__ == "__main__":
    exit_with(main)
