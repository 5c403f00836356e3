"""Train the quickstart with several seeds, measure each model, and print the figures before and after in one table.

    python recipes/smollm2-135m/seeds.py --seeds 42 43 44

Start it in the root of the repository. The recipe's own seed trains in the recipe's output_dir, seed N in
`<output_dir>-seed-N`. Each folder gets the results and the report of its model; `seeds.md` in output_dir gets the
table. Finished runs are not trained again and answers are kept, so the same command continues, and adds seeds.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from train.cli import CommandLine, non_negative_int, run_command
from train.errors import UserError
from train.evaluation import compare, gain, rules
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
    before = Path(recipe.model.name_or_path)
    folders = {seed: output_dir_of(recipe, seed) for seed in dict.fromkeys(options.seeds)}
    measure_pressure(before)
    for seed, folder in folders.items():
        train(options.recipe, seed, folder)
        keep_scores(folders.values(), folder)
        evaluate("rules", "--data", HELD_OUT, "--before", before, "--after", folder, *LIMITS)
        evaluate("gain", "--data", HELD_OUT, "--before", before, "--model", folder, "--dtype", "bfloat16")
        measure_pressure(folder)
        evaluate("compare", before, folder)
    text = table(before, folders)
    path = Path(recipe.output_dir, "seeds.md")
    with atomic_write(path) as [staged]:
        write_text(staged, text)
    print(f"\n{text}\ntable: {path}")


def output_dir_of(recipe: Recipe, seed: int) -> Path:
    """Return the folder of the model of a seed."""
    return Path(recipe.output_dir if seed == recipe.seed else f"{recipe.output_dir}-seed-{seed}")


def train(recipe: Path, seed: int, folder: Path) -> None:
    """Train the model of a seed, unless its run has finished. Raises UserError."""
    launch = ("accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "train/sft.py")
    words = ["-m", *launch, "--recipe", str(recipe), f"seed={seed}", f"output_dir={folder}"]
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


def table(before: Path, folders: dict[int, Path]) -> str:
    """Return the figures before training, and the mean [minimum, maximum] over the seeds after it, in percent."""
    after = [read_results(folder) for folder in folders.values()]
    results_before, _ = read_before(after[0], before)
    rows = []
    for line, (kind, name) in MEASURES.items():
        shares = [value(results, kind, name) for results in after]
        mean = sum(shares) / len(shares)
        rows.append(
            (line, f"{value(results_before, kind, name):.1%}", f"{mean:.1%} [{min(shares):.1%}, {max(shares):.1%}]")
        )
    seeds = ", ".join(map(str, folders))
    return format_table(("", "before", "after: mean [minimum, maximum]"), rows) + f"\n\nSeeds: {seeds}.\n"


def value(results: dict[str, Results], kind: str, name: str) -> float:
    """Return the value of a measure."""
    return results[kind].measures[name].value


if __name__ == "__main__":
    sys.exit(main())
