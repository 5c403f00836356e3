"""Train and measure the quickstart with several seeds, and write a table of means and ranges.

    python recipes/smollm2-135m/seeds.py --seeds 42 43 44

Each seed runs `make run-quickstart`, the commands of `make quickstart` without the installation, in
outputs/smollm2-135m-quickstart-SEED. A seed that is finished is not trained or asked again, so the same command
continues after a stop. The data is the same for all seeds; the seed decides the order of the rows and the validation
rows. Writes quickstart/seeds.md and quickstart/seeds.json beside this file.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIGURES = {
    ("rules", "held-out wordings"): "held-out wordings",
    ("rules", "rules never trained"): "rules never trained",
    ("hierarchy", "reference: held"): "message alone",
    ("hierarchy", "conflict: held"): "conflict",
    ("hierarchy", "injected: held"): "injected",
    ("hierarchy", "extraction: held"): "extraction",
    ("hierarchy", "permitted: held"): "permitted",
    ("turns", "plain: holds in all 5 turns"): "all five turns",
    ("turns", "push-back: holds in all 5 turns"): "all five turns with a push-back",
    ("hierarchy", "reference: answered"): "answers right, message alone",
    ("hierarchy", "conflict: answered"): "answers right, conflict",
    ("turns", "plain: question answered in turn 1"): "answers right, first of five turns",
}
"""Command and measure in compare.json -> name in the table. All are shares."""

Values = dict[str, float]


def folder_of(seed: int) -> Path:
    """Return the output folder of a seed, relative to the repository."""
    return Path("outputs") / f"smollm2-135m-quickstart-{seed}"


def run_seed(seed: int) -> None:
    """Train and measure one seed. Raises CalledProcessError if a command fails."""
    binaries = Path(sys.executable).parent
    command = ["make", "run-quickstart", f"SEED={seed}", f"QUICKSTART={folder_of(seed)}", f"BIN={binaries}"]
    subprocess.run(command, cwd=ROOT, check=True)


def read_figures(file: Path) -> tuple[Values, Values]:
    """Return the figures before and after training in a compare.json, by their names in the table."""
    measures = {(each["kind"], each["measure"]): each for each in json.loads(file.read_text())["measures"]}
    before, after = (
        {name: measures[key][side]["value"] for key, name in FIGURES.items() if key in measures} for side in ("a", "b")
    )
    return before, after


def make_table(before: Values, after: Mapping[int, Values]) -> str:
    """Return a Markdown table: each figure before training, its mean and range over seeds, and each seed's."""
    seeds = list(after)
    lines = [
        f"| | before | mean | range | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        "|---|" + "---|" * (3 + len(seeds)),
    ]
    for name in before:
        values = [after[seed][name] for seed in seeds]
        cells = [_percent(before[name]), _percent(sum(values) / len(values))]
        cells += [f"{100 * min(values):.1f} to {100 * max(values):.1f}", *map(_percent, values)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all seeds, print the table, and write it with its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="seeds (default 42 43 44)")
    parser.add_argument("--output", type=Path, default=HERE / "quickstart", help="folder of seeds.md and seeds.json")
    options = parser.parse_args(arguments)
    before: Values = {}
    after: dict[int, Values] = {}
    for seed in options.seeds:
        run_seed(seed)
        before, after[seed] = read_figures(ROOT / folder_of(seed) / "compare.json")
    table = make_table(before, after)
    record: dict[str, Any] = {"before": before, "after": after}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "seeds.md").write_text(table, encoding="utf-8")
    (options.output / "seeds.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
