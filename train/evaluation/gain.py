r"""System gain: how much likelier a model finds a reference answer under its own system message than under others.

    python scripts/evaluate.py gain \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --model outputs/smollm2-135m-quickstart

With 95 % intervals; train/system_gain/metric.py says what the figure can't see. Writes gain.json, gain.png and a section
into report.md. Scores are kept in gain_scores.jsonl, so the same command continues a killed run.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import non_negative_int, positive_int
from train.errors import UserError, replace_in_errors
from train.evaluation.folders import require_model, require_results_folder
from train.evaluation.results import folder_of
from train.evaluation.results_dir import exclusive
from train.formatting import format_count
from train.progress import progress_bar
from train.recipe import ModelSection, Source
from train.reporting.markdown import replace_section, truncate_middle
from train.reporting.plots import error_bars, load_pyplot
from train.storage.atomic_write import atomic_write, write_text
from train.storage.local_paths import parse_path_or_id

if TYPE_CHECKING:
    from train.data.sources.formats import RowError
    from train.system_gain.metric import Figures, SystemGain
    from train.system_gain.variants import Label, LabelledConversation, VariantRows

HEADING = "## System gain"
_MOST_BARS = 30


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "gain", help="how much likelier answers are under their own system message", description=__doc__
    )
    parser.add_argument(
        "--model", type=parse_path_or_id, required=True, help="folder or hub id of a model or an adapter"
    )
    parser.add_argument(
        "--before", type=parse_path_or_id, help="the model that it was trained from, measured on the same rows"
    )
    parser.add_argument(
        "--data",
        type=parse_path_or_id,
        required=True,
        nargs="+",
        help="rows with answers: any source that a recipe takes",
    )
    parser.add_argument("--split", default="train", help="the split of data that has several (default train)")
    parser.add_argument(
        "--template",
        type=parse_path_or_id,
        help="as chat.template of a recipe (default: the one that --model was saved with)",
    )
    parser.add_argument(
        "--system-role",
        default="native",
        choices=("native", "merge_into_user", "turn"),
        help="as chat.system_role of a recipe (default native: a model that we trained has its policy in its template)",
    )
    parser.add_argument(
        "--others", type=positive_int, default=2, help="other messages for each row, at most (default 2)"
    )
    parser.add_argument("--limit", type=positive_int, help="most rows to measure, drawn by the seed (default all)")
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="COLUMN", help="more columns of the data by which figures are grouped"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what to compute in (default float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help="tokens at a time (default 8192)")
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="of the other messages and the intervals (default 0)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the figures go; gain.png beside it (default gain.json in the folder of --model)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, write the figures and the plot, and the section of report.md. Raises UserError."""
    folder = Path(options.model)
    file: Path = options.json or folder / "gain.json"
    if not options.json:
        require_results_folder("--model", options.model, "For a hub id, say --json FILE as well.")
    for option, model in (("--model", options.model), ("--before", options.before)):
        if model:
            require_model(option, model)
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise UserError(f"--json {file}: that is no file in a folder that is there")
    with exclusive(file.parent, "gain"):
        _measure_all(options, folder, file)


def _measure_all(options: argparse.Namespace, folder: Path, file: Path) -> None:
    names = {"before": options.before, "after": options.model} if options.before else {folder.name: options.model}
    made, texts = rows_for(options, [*names.values()])
    for kind, count in made.dropped.items():
        print(f"left out: {format_count(count, 'row')}: {kind} (the first: {made.examples[kind]})", flush=True)

    from train.system_gain.metric import render_table

    measured: dict[str, SystemGain] = {}
    for name, model in names.items():
        measured[name], dtype = _measure(model, made, file, options)
    change = measured["after"].change_from(measured["before"], seed=options.seed) if options.before else None
    record = {
        "data": options.data,
        "fingerprint": texts,
        "left_out": dict(made.dropped),
        "options": {
            **{key: getattr(options, key) for key in ("split", "template", "system_role", "others", "limit", "seed")},
            "dtype": dtype,
        },
        "models": {
            name: {"model": names[name], "folder": folder_of(names[name]), **one.record()}
            for name, one in measured.items()
        },
    }
    if change:
        record["change"] = [
            {"of": label and label[0], "is": label and label[1], **figures.record()}
            for label, figures in change.items()
        ]
    rows = file.with_name(f"{file.stem}_rows.jsonl")
    try:
        with atomic_write(rows, file, file.with_name("gain.png")) as [lines, figures_file, plot]:
            write_text(lines, "".join(_row_lines(made, measured)))
            write_text(figures_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            draw(measured, plot)
        text = f"{HEADING}\n\n{_about(made, measured)}\n\n{render_table(measured, change)}"
        if not options.json:
            replace_section(folder / "report.md", HEADING, f"{text}\n![gain](gain.png)\n")
    except OSError as fault:
        raise UserError(f"{file.parent}: can't be written: {fault.strerror}") from fault
    print(text)
    print(f"the figures are in {file}, those of each row in {rows}, the plot in {file.with_name('gain.png')}")


def _row_lines(made: "VariantRows", measured: "dict[str, SystemGain]") -> Iterator[str]:
    """A line of JSON a row: where it stands, the instruction that siblings share, and what each model has there."""
    from train.system_gain.metric import MEASURES

    for number, row in enumerate(made.rows):
        values = {name: dict(zip(MEASURES, one.values[number].tolist(), strict=True)) for name, one in measured.items()}
        yield json.dumps({"place": row.place, "instruction": row.instruction, **values}, ensure_ascii=False) + "\n"


def rows_for(options: argparse.Namespace, models: list[str]) -> "tuple[VariantRows, str]":
    """The rows to measure, in the tokens of the last of `models`, which the others must share, and their fingerprint.

    Raises UserError.
    """
    from pydantic import ValidationError

    from train.data.chat.system_role import apply_system_role
    from train.data.chat.template import use_template
    from train.data.tokens.workers import RowTokenizer
    from train.evaluation.models.local import tokenizer_of
    from train.system_gain.variants import LabelledConversation, make_variants, read_labelled_conversations

    with replace_in_errors({"--model": "--model or --before"}):
        tokenizers = {model: tokenizer_of(model) for model in models}
    tokenizer = tokenizers[models[-1]]
    for model, other in tokenizers.items():
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--before {model}: its tokens are not those of {models[-1]}, so the two can't be measured on the same "
                "rows. Measure each by itself."
            )
    try:
        sources = [Source(path=path, split=options.split) for path in options.data]
    except ValidationError as fault:
        raise UserError(f"--data or --split: {fault.errors()[0]['msg']}") from fault
    use_template(tokenizer, options.template)
    apply_system_role(tokenizer, options.system_role)
    rows = read_labelled_conversations(sources, options.group)
    known = {column for row in rows if isinstance(row, LabelledConversation) for column, _ in row.labels}
    for column in options.group:
        if column not in known:
            raise UserError(f"--group {column}: no row has a text in a column of that name")
    longest = min((found for found in map(_positions, models) if found), default=None)
    made = make_variants(
        rows,
        RowTokenizer(tokenizer, "assistant"),
        others=options.others,
        limit=options.limit,
        max_length=longest,
        seed=options.seed,
    )
    if not made.rows:
        why = "; ".join(f"{count:,}: {kind}" for kind, count in made.dropped.items()) or "there are none"
        raise UserError(f"--data {' '.join(options.data)}: no row can be measured ({why}). Give rows with answers and "
                        "at least two different system messages.")  # fmt: skip
    return made, fingerprint_of(rows, made)


def fingerprint_of(rows: "Sequence[LabelledConversation | tuple[str, RowError]]", made: "VariantRows") -> str:
    """A checksum of the texts of all rows, and of which are measured: by it `compare` knows that two are of the same.

    Where the rows stand is no part of it. Messages are drawn from all of them.
    """
    from train.system_gain.variants import LabelledConversation

    measured = {row.place for row in made.rows}
    told = [
        [row.conversation.messages, row.conversation.tools, row.conversation.place in measured]
        if isinstance(row, LabelledConversation)
        else None
        for row in rows
    ]
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16)
    return digest.hexdigest()


def _positions(model: str) -> int | None:
    """How many tokens it was made for; of an adapter, those of its base. Raises UserError where it has no config."""
    from train.evaluation.models.local import base_of
    from train.model.load import load_config

    with replace_in_errors({"model.name_or_path": f"--model or --before {model}"}):
        config = load_config(ModelSection(name_or_path=base_of(model) or model)).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _measure(name: str, made: "VariantRows", file: Path, options: argparse.Namespace) -> "tuple[SystemGain, str]":
    """The figures of one model, and the dtype that it ran in."""
    from train.evaluation.models.local import fingerprint
    from train.model.load import load_saved
    from train.system_gain.metric import system_gain
    from train.system_gain.score_cache import ScoreCache

    model = load_saved(name, options.dtype)
    total = sum(len(variant) for row in made.rows for variant in row.all)
    told_apart = json.dumps([fingerprint(name), str(model.dtype)])
    with (
        ScoreCache(file.with_name("gain_scores.jsonl"), told_apart) as scores,
        progress_bar(f"scoring answers with {name}", total=total, unit="answers") as scoring,
    ):
        found = system_gain(
            model,
            made.rows,
            tokens_per_batch=options.batch_tokens,
            seed=options.seed,
            scores=scores,
            on_progress=scoring.advance,
        )
    return found, str(model.dtype).removeprefix("torch.")


def _about(made: "VariantRows", measured: "dict[str, SystemGain]") -> str:
    one = next(iter(measured.values()))
    tokens = sum(row.tokens for row in made.rows)
    lines = f"Reference answers of {tokens / len(made.rows):.0f} tokens on average; "
    lines += f"{one.with_siblings:,} of {format_count(one.overall.rows, 'row')} against other messages of the same instruction"
    lines += ", the rest against those of other rows." if one.with_siblings < one.overall.rows else "."
    if one.other_tokens:
        lines += f" The template joins the answer to what is before it in {format_count(one.other_tokens, 'row')}."
    return lines


def draw(measured: "dict[str, SystemGain]", path: Path) -> None:
    """The gain over other messages with its interval, overall and of each group (of many, the largest), as a PNG."""
    pyplot = load_pyplot()
    first = next(iter(measured.values()))
    largest = sorted(first.groups, key=lambda label: -first.groups[label].rows)[:_MOST_BARS]
    labels: list[Label | None] = [None, *sorted(largest)]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(labels) + 1.8), dpi=100, layout="constrained")
    colours = ["lightgray", "tab:blue"] if len(measured) == 2 else ["tab:blue"]
    height = 0.8 / len(measured)
    for number, (name, one) in enumerate(measured.items()):
        found: list[Figures] = [one.overall if label is None else one.groups[label] for label in labels]
        places = [row + (number - (len(measured) - 1) / 2) * height for row in range(len(labels))]
        means = [figures.gain.mean for figures in found]
        ends = error_bars((figures.gain.mean, figures.gain.low, figures.gain.high) for figures in found)
        axes.barh(places, means, height, xerr=ends, label=name, color=colours[number], capsize=2)
    names = ["all rows" if label is None else truncate_middle(f"{label[0]}: {label[1]}", 48) for label in labels]
    axes.set_yticks(range(len(labels)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("nats per token that the answer gains by its own system message over others (95 %)")
    axes.margins(y=0.01)
    figure.suptitle("System gain", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
