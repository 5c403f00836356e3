r"""The results of two models side by side: what two folders hold of gain, rules, ifeval, bench and harness.

    python scripts/evaluate.py compare outputs/smollm2-135m-instruct \
        outputs/smollm2-135m-quickstart

Writes compare.json and compare.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import non_negative_int
from train.errors import UserError
from train.reporting.markdown import truncate_middle
from train.reporting.plots import error_bars, load_pyplot
from train.resampling import explain_missing_intervals
from train.storage.atomic_write import atomic_write, write_text
from train.storage.local_paths import describe_missing_path

if TYPE_CHECKING:
    from train.evaluation.compare import Comparison, MeasurePair
    from train.evaluation.results import Measure, Results
    from train.multifaceted.bench.pairwise import PairwiseComparison

_KINDS = ("gain", "rules", "ifeval", "bench", "harness")
_AXES = {
    "share": "share (95 %)",
    "points": "difference of shares (95 %)",
    "nats": "nats per token (95 %)",
    "score": "score (95 %)",
}


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser("compare", help="the results of two models side by side", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="a folder with results, or one of their JSON files")
    parser.add_argument("second", type=Path, metavar="B", help="what to compare it with: the difference is B less A")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=_KINDS,
        metavar="KIND",
        help=f"compare only these of {', '.join(_KINDS)} (default: all that both have)",
    )
    parser.add_argument("--details", action="store_true", help="show rules, sources and tasks within groups, too")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the intervals (default 0)")
    parser.add_argument("--output-dir", type=Path, help="for compare.json and compare.png (default the folder of B)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compare, print the table, write compare.json and compare.png. Raises UserError."""
    from train.evaluation.compare import compare_results
    from train.evaluation.results import read_before, read_results

    for place in (options.first, options.second):
        if not place.exists():
            raise UserError(f"{place}: there is no such folder or file: {describe_missing_path(place)}")
    folders = [place if place.is_dir() else place.parent for place in (options.first, options.second)]
    one_is_a_folder = options.first.is_dir() or options.second.is_dir()
    if options.first.samefile(options.second) or (one_is_a_folder and folders[0].samefile(folders[1])):
        raise UserError(
            f"{options.first} and {options.second}: A and B are the same results. Name the folders or files of two "
            "models (--output-dir, or --json of gain, has results written elsewhere than to the model)."
        )
    sides = []
    of_second = read_results(options.second)
    of_first, measured_against = read_before(of_second, options.first)
    # What was measured with --before A stands in the folder of B.
    for place, found in (options.first, of_first), (options.second, of_second):
        kept = {kind: results for kind, results in found.items() if kind in (options.only or _KINDS)}
        if not kept:
            raise UserError(f"{place}: it has {', '.join(found)}, and nothing of --only {' '.join(options.only)}")
        sides.append(kept)
    only_second = {
        kind: f"it was measured with --before {before}, and A is {options.first.resolve()}"
        for kind, before in measured_against.items()
    }
    comparison = compare_results(*sides, seed=options.seed, only_second=only_second)
    shown = [pair for pair in comparison.pairs if options.details or not pair.first.detail]
    versus = _pairwise(sides, options.seed)
    folder: Path = options.output_dir or (options.second if options.second.is_dir() else options.second.parent)
    record = {
        "a": {"place": str(options.first), "models": {kind: one.model for kind, one in sides[0].items()}},
        "b": {"place": str(options.second), "models": {kind: one.model for kind, one in sides[1].items()}},
        "notes": comparison.notes,
        "measures": [pair.record() for pair in comparison.pairs],
        "bench_by_rows": versus.record() if versus else None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "compare.json", folder / "compare.png") as [figures, plot]:
            write_text(figures, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            draw(shown, (str(options.first), str(options.second)), plot)
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    print(table(comparison, shown, (str(options.first), str(options.second))))
    if versus:
        print(f"bench, row by row:\n\n{versus.markdown()}")
    print(f"the figures are in {folder / 'compare.json'}, the plot in {folder / 'compare.png'}")


def _pairwise(sides: "Sequence[Mapping[str, Results]]", seed: int) -> "PairwiseComparison | None":
    """Wins of each on the bench, where both have its rows; B is the first, as all differences are B less A."""
    from train.multifaceted.bench.pairwise import compare_pairwise

    if not all("bench" in side for side in sides):
        return None
    rows = [side["bench"].path.with_name("bench_rows.jsonl") for side in sides]
    return (
        compare_pairwise(rows[1], rows[0], names=("B", "A"), seed=seed)
        if all(path.is_file() for path in rows)
        else None
    )


def table(comparison: "Comparison", shown: "Sequence[MeasurePair]", names: tuple[str, str]) -> str:
    """The measures as Markdown, and below them what is to be known."""
    lines = [f"A = {names[0]}", f"B = {names[1]}", "", "| | A | B | B less A | p | rows |", "|---|---|---|---|---|---|"]
    for pair in shown:
        cells = [f"{pair.kind}: {pair.name}", _measure(pair.first), _measure(pair.second), _change(pair)]
        cells += ["" if pair.difference is None else f"{pair.difference.p:.4f}"]
        cells += ["" if pair.rows is None else f"{pair.rows:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "B less A: the mean over the rows of both, with a 95 % interval; p by flipping signs, of each alone."]
    if any(pair.rows is None for pair in shown):
        lines += ["No interval: a side kept no rows of this figure."]
    lines += explain_missing_intervals("\n".join(lines), "independent rows")
    return "\n".join([*lines, *(f"note: {note}" for note in comparison.notes), ""])


def _measure(measure: "Measure") -> str:
    scale, digits = (100, 1) if measure.unit in ("share", "points") else (1, 3)
    shown = f"{scale * measure.value:.{digits}f}{' %' if measure.unit == 'share' else ''}"
    if measure.low is None or measure.high is None:
        return f"{shown} ({measure.missing})" if measure.missing else shown
    return f"{shown} [{scale * measure.low:.{digits}f}, {scale * measure.high:.{digits}f}]"


def _change(pair: "MeasurePair") -> str:
    scale, digits = (100, 1) if pair.first.unit in ("share", "points") else (1, 3)
    found = pair.difference
    if found is None:
        return f"{scale * pair.change:+.{digits}f}"
    shown = f"{scale * found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return f"{shown} ({found.missing})"
    return f"{shown} [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"


def draw(shown: "Sequence[MeasurePair]", names: tuple[str, str], path: Path) -> None:
    """Save `plot` as a PNG."""
    figure = plot(shown, names)
    figure.savefig(path)
    load_pyplot().close(figure)


def plot(shown: "Sequence[MeasurePair]", names: tuple[str, str]) -> Any:
    """A figure with a panel for each kind and unit, and a pair of bars with intervals for each measure."""
    pyplot = load_pyplot()
    panels: dict[tuple[str, str], list[MeasurePair]] = {}
    for pair in shown:
        panels.setdefault((pair.kind, pair.first.unit), []).append(pair)
    heights = [len(pairs) + 1.5 for pairs in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 0.42 * sum(heights) + 1.4),
        dpi=100,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for ((kind, unit), pairs), one in zip(panels.items(), axes[:, 0], strict=True):
        for offset, side, colour, name in (
            (-0.2, "first", "lightgray", f"A = {truncate_middle(names[0], 100)}"),
            (0.2, "second", "tab:blue", f"B = {truncate_middle(names[1], 100)}"),
        ):
            measures: list[Measure] = [getattr(pair, side) for pair in pairs]
            values = [measure.value for measure in measures]
            ends = error_bars((measure.value, measure.low, measure.high) for measure in measures)
            places = [place + offset for place in range(len(pairs))]
            one.barh(places, values, 0.4, xerr=ends, color=colour, capsize=2, label=name)
        one.set_yticks(range(len(pairs)), [truncate_middle(pair.name, 60) for pair in pairs])
        one.invert_yaxis()
        one.axvline(0, color="black", linewidth=0.8)
        one.set_title(kind, loc="left", fontsize=10)
        one.set_xlabel(_AXES[unit])
        one.margins(y=0.02)
    figure.suptitle("Results of two models on the same rows", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= 50 else 1
    # Outside of all panels: inside, it would lie on bars.
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=columns, frameon=False)
    return figure
