r"""Results of two models side by side, paired by rows.

    python scripts/evaluate.py compare outputs/smollm2-135m-instruct \
        outputs/smollm2-135m-quickstart

Writes compare.json, compare.png and a section of report.md; for turns and sysbench also turns_compare.png and
sysbench_compare.png, the curves of both models.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from train.cli import non_negative_int
from train.errors import UserError
from train.evaluation.formatting import format_estimate
from train.evaluation.measured_models import describe_several
from train.evaluation.results import KINDS, Measure, Results, read_before, read_results
from train.evaluation.results_dir import Writer, as_json, write_results
from train.evaluation.turns import report, sysbench_report
from train.multifaceted.bench.pairwise import PairwiseComparison, compare_pairwise, scores_of_shared_rubrics
from train.progress import progress_bar
from train.reporting.conditions import all_differences, missing_conditions, recorded_differences
from train.reporting.markdown import truncate_middle
from train.reporting.plots import BASELINE_COLOR, COLOR, BarSeries, draw_bars, new_figure
from train.resampling import DIFFERENCE_BOUNDS, Bounds, Estimate, estimate_means, explain_missing_intervals
from train.storage.local_paths import describe_missing_path

HEADING = "## Two models side by side"
_BOUNDS: dict[str, Bounds] = {"share": DIFFERENCE_BOUNDS, "points": (-2.0, 2.0)}
"""Bounds of the difference of two measures, by their unit; other units have none."""
_CURVES = {"turns": report.plot_curves, "sysbench": sysbench_report.plot_curves}
"""Plots of two records over the turns, by kind."""
_AXES = {
    "share": "share (95 %)",
    "points": "difference of shares (95 %)",
    "nats": "nats per token (95 %)",
    "score": "score (95 %)",
}


@dataclass(frozen=True)
class MeasurePair:
    """One measure of both models.

    - `difference`: second minus first, with interval and p if rows are paired.
    - `rows`: number of paired rows; None if a side kept none, which leaves the plain difference.
    """

    kind: str
    name: str
    first: Measure
    second: Measure
    difference: Estimate | None
    rows: int | None

    @property
    def change(self) -> float:
        """Return second minus first."""
        return self.second.value - self.first.value

    def record(self) -> dict[str, Any]:
        """Return the pair for JSON."""
        sides = {
            side: {"value": measure.value, "low": measure.low, "high": measure.high}
            for side, measure in (("a", self.first), ("b", self.second))
        }
        paired = asdict(self.difference) if self.difference else None
        return {"kind": self.kind, "measure": self.name, "unit": self.first.unit, **sides, "change": self.change,
                "paired": paired, "rows": self.rows}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Pairs of measures. `notes`: settings that may differ and do, and measures that only one side has."""

    pairs: Sequence[MeasurePair]
    notes: Sequence[str]


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser("compare", help="results of two models side by side", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="a folder with results, or one of their JSON files")
    parser.add_argument("second", type=Path, metavar="B", help="the same of the other model; differences are B minus A")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=KINDS,
        metavar="KIND",
        help=f"compare only these of {', '.join(KINDS)} (default: all that both have)",
    )
    parser.add_argument("--details", action="store_true", help="also show rules, sources, and tasks within groups")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the intervals (default 0)")
    parser.add_argument("--output-dir", type=Path, help="for all files (default the folder of B)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compare, print the table, and write compare.json, the plots and a section of report.md. Raises UserError."""
    _refuse_same_results(options.first, options.second)
    sides = []
    of_second = read_results(options.second)
    # Results of A that were measured with --before A are in the folder of B.
    of_first, other_models = read_before(of_second, options.first)
    for place, results in (options.first, of_first), (options.second, of_second):
        selected = {kind: of_kind for kind, of_kind in results.items() if kind in (options.only or KINDS)}
        if not selected:
            raise UserError(f"{place}: has {', '.join(results)}, and nothing of --only {' '.join(options.only)}")
        sides.append(selected)
    only_second = {
        kind: f"it was measured with --before {before}, and A is {options.first.resolve()}"
        for kind, before in other_models.items()
    }
    names = str(options.first), str(options.second)
    several = [
        f"{side} has results of several models: {listed}"
        for side, results in zip("AB", sides, strict=True)
        if (listed := describe_several({kind: of_kind.model for kind, of_kind in results.items() if kind != "rules"}))
    ]
    comparison = compare_results(*sides, seed=options.seed, only_second=only_second)
    comparison = replace(comparison, notes=[*several, *comparison.notes])
    shown = [pair for pair in comparison.pairs if options.details or not pair.first.detail]
    wins = _compare_bench_rows(sides, options.seed)
    folder: Path = options.output_dir or (options.second if options.second.is_dir() else options.second.parent)
    record = {
        "a": {"place": names[0], "models": {kind: results.model for kind, results in sides[0].items()}},
        "b": {"place": names[1], "models": {kind: results.model for kind, results in sides[1].items()}},
        "notes": comparison.notes,
        "measures": [pair.record() for pair in comparison.pairs],
        "bench_by_rows": wins.record() if wins else None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from error
    files: dict[str, Writer] = {"compare.json": as_json(record), "compare.png": partial(plot_pairs, shown, names)}
    for kind, plot in _CURVES.items():
        if all(kind in side for side in sides):
            records = [json.loads(side[kind].path.read_text(encoding="utf-8")) for side in sides]
            titles = (f"{side} = {truncate_middle(name, 50)}" for side, name in zip("AB", names, strict=True))
            files[f"{kind}_compare.png"] = partial(plot, dict(zip(titles, records, strict=True)))
    text = table(comparison, shown, names)
    if wins:
        text += f"\nbench, row by row:\n\n{wins.markdown()}"
    images = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in files if name.endswith(".png"))
    write_results(folder, files, heading=HEADING, section=f"{HEADING}\n\n{text}\n{images}\n")
    print(text)
    print(f"figures: {folder / 'compare.json'}; plot: {folder / 'compare.png'}")


def _refuse_same_results(first: Path, second: Path) -> None:
    """Raise UserError if one of the two does not exist, or if both are the same results."""
    for place in (first, second):
        if not place.exists():
            raise UserError(f"{place}: there is no such folder or file: {describe_missing_path(place)}")
    folders = [place if place.is_dir() else place.parent for place in (first, second)]
    is_folder = first.is_dir() or second.is_dir()
    if first.samefile(second) or (is_folder and folders[0].samefile(folders[1])):
        raise UserError(
            f"{first} and {second}: A and B are the same results. Name the folders or files of two models "
            "(--output-dir, or --json of gain, writes results to another folder than the model's)."
        )


def compare_results(
    first: Mapping[str, Results],
    second: Mapping[str, Results],
    *,
    seed: int = 0,
    only_second: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare every measure that both have. Raises UserError if data or settings differ.

    `only_second`: kind -> why only the second has it, if the reason is known.
    """
    reasons = {
        kind: f": {reason}" for kind, reason in (only_second or {}).items() if kind in second and kind not in first
    }
    shared = [kind for kind in first if kind in second]
    if not shared:
        raise UserError(
            f"A and B have no kind of results in common: A has {', '.join(first)}, B has {', '.join(second)}"
            + "".join(f". {kind}{reason}" for kind, reason in list(reasons.items())[:1])
        )
    errors = [
        f"{kind}: {difference}"
        for kind in shared
        for difference in recorded_differences(first[kind].conditions, second[kind].conditions)
    ]
    if errors:
        raise UserError(
            f"A and B were measured differently: {'; '.join(errors)}. Measure both with the same data and options, or "
            "select the kinds to compare with --only."
        )
    notes = [f"{kind}: only A has it" for kind in first if kind not in second]
    notes += [f"{kind}: only B has it{reasons.get(kind, '')}" for kind in second if kind not in first]
    pairs = []
    for kind in shared:
        notes += _notes(kind, first[kind], second[kind])
        ours, theirs = first[kind].measures, second[kind].measures
        names = [name for name in ours if name in theirs]
        with progress_bar(f"comparing {kind}", total=len(names), unit="measures") as comparing:
            for name in names:
                pairs.append(_pair(kind, name, ours[name], theirs[name], seed))
                comparing.advance()
    return Comparison(pairs, notes)


def _notes(kind: str, first: Results, second: Results) -> list[str]:
    """List settings that differ or are not recorded, unfinished results, and measures that only one side has."""
    lines = [*missing_conditions(first.conditions, second.conditions), *all_differences(first.notes, second.notes)]
    lines += [f"{side} {results.incomplete}" for side, results in (("A", first), ("B", second)) if results.incomplete]
    lines += [
        f"{name}: only {side} has it"
        for side, results, others in (("A", first, second), ("B", second, first))
        for name, measure in results.measures.items()
        if name not in others.measures and not measure.detail
    ]
    return [f"{kind}: {line}" for line in lines]


def _pair(kind: str, name: str, first: Measure, second: Measure, seed: int) -> MeasurePair:
    if first.rows is None or second.rows is None:
        return MeasurePair(kind, name, first, second, None, None)
    shared = [row for row in first.rows if row in second.rows]
    differences: list[float] = []
    groups: list[str] = []
    rows = 0
    for row in shared:
        ours, theirs = first.rows[row], second.rows[row]
        if row in first.parts and row in second.parts:
            if not (scores := scores_of_shared_rubrics(first.parts[row], second.parts[row])):
                continue
            ours, theirs = (scores[0],), (scores[1],)
        rows += 1
        differences += [b - a for a, b in zip(ours, theirs, strict=True)]
        groups += [first.groups.get(row, row)] * len(ours)
    if not differences:
        return MeasurePair(kind, name, first, second, None, None)
    _, numbers = np.unique(groups, return_inverse=True)
    column = np.array(differences)[:, None]
    bounds = [_BOUNDS.get(first.unit)]
    (difference,) = estimate_means(column, numbers.astype(np.int64), np.zeros(1), bounds, seed=seed)
    return MeasurePair(kind, name, first, second, difference, rows)


def _compare_bench_rows(sides: Sequence[Mapping[str, Results]], seed: int) -> PairwiseComparison | None:
    """Return the wins on the bench if both have its rows. B comes first, as all differences are B minus A."""
    if not all("bench" in side for side in sides):
        return None
    rows = [side["bench"].path.with_name("bench_rows.jsonl") for side in sides]
    if not all(path.is_file() for path in rows):
        return None
    return compare_pairwise(rows[1], rows[0], names=("B", "A"), seed=seed)


def table(comparison: Comparison, shown: Sequence[MeasurePair], names: tuple[str, str]) -> str:
    """Return the measures and the notes as Markdown."""
    lines = [
        f"A = {names[0]}",
        f"B = {names[1]}",
        "",
        "| | A | B | B minus A | p | rows |",
        "|---|---|---|---|---|---|",
    ]
    for pair in shown:
        direction = " (lower is better)" if pair.first.lower_is_better or pair.second.lower_is_better else ""
        cells = [f"{pair.kind}: {pair.name}{direction}", _format_measure(pair.first), _format_measure(pair.second)]
        cells += [_format_change(pair), "" if pair.difference is None else f"{pair.difference.p:.4f}"]
        cells += ["" if pair.rows is None else f"{pair.rows:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "B minus A: mean over the shared rows with a 95 % interval; p of a sign-flip test per measure."]
    if any(pair.rows is None for pair in shown):
        lines += ["No interval: a side kept no rows of this figure."]
    lines += explain_missing_intervals("\n".join(lines), "independent rows")
    return "\n".join([*lines, *(f"note: {note}" for note in comparison.notes), ""])


def _format_measure(measure: Measure) -> str:
    scale, digits = _scale(measure)
    unit = " %" if measure.unit == "share" else ""
    return format_estimate(
        measure.value, measure.low, measure.high, measure.missing, scale=scale, digits=digits, unit=unit
    )


def _format_change(pair: MeasurePair) -> str:
    scale, digits = _scale(pair.first)
    change = pair.difference
    numbers = (change.mean, change.low, change.high, change.missing) if change else (pair.change, None, None)
    return format_estimate(*numbers, scale=scale, digits=digits, sign="+")


def _scale(measure: Measure) -> tuple[int, int]:
    """Return factor and digits: percent for shares and their differences."""
    return (100, 1) if measure.unit in ("share", "points") else (1, 3)


def plot_pairs(shown: Sequence[MeasurePair], names: tuple[str, str], path: Path) -> None:
    """Save a PNG with a panel for each kind and unit, and a pair of bars with intervals for each measure."""
    panels: dict[tuple[str, str], list[MeasurePair]] = {}
    for pair in shown:
        panels.setdefault((pair.kind, pair.first.unit), []).append(pair)
    heights = [len(pairs) + 1.5 for pairs in panels.values()]
    labels = [f"{side} = {truncate_middle(name, 100)}" for side, name in zip("AB", names, strict=True)]
    height = 0.42 * sum(heights) + 1.4
    with new_figure(path, 9, height, nrows=len(panels), squeeze=False, height_ratios=heights) as (figure, axes):
        for ((kind, unit), pairs), panel in zip(panels.items(), axes[:, 0], strict=True):
            sides = [pair.first for pair in pairs], [pair.second for pair in pairs]
            series = [
                BarSeries([(measure.value, measure.low, measure.high) for measure in side], label, color)
                for side, label, color in zip(sides, labels, (BASELINE_COLOR, COLOR), strict=True)
            ]
            draw_bars(panel, [truncate_middle(pair.name, 60) for pair in pairs], series)
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(kind, loc="left", fontsize=10)
            panel.set_xlabel(_AXES[unit])
        figure.suptitle("Results of two models on the same rows", fontsize=11)
        handles, texts = axes[0, 0].get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) <= 50 else 1
        # Outside of all panels: inside, it would cover bars.
        figure.legend(handles, texts, loc="outside lower center", fontsize=8, ncols=columns, frameon=False)
