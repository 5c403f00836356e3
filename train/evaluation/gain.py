r"""System gain: how much likelier a reference answer is under its own system message than under others.

    python scripts/evaluate.py gain \
        --data recipes/smollm2-135m/data/held_out.jsonl \
        --before outputs/smollm2-135m-instruct \
        --model outputs/smollm2-135m-quickstart

With 95 % intervals; train/system_gain/metric.py states the limits of the figure. Writes gain.json, gain.png,
gain_rows.jsonl (the figures of each row, which data.sources.N.min_gain of a recipe reads) and a section of report.md.
Scores are kept in gain_scores.jsonl, so the same command continues a killed run.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import non_negative_int, positive_int
from train.errors import UserError, replace_in_errors
from train.evaluation.gain_rows import plot_histogram, row_records, rows_section
from train.evaluation.required_paths import require_model, require_results_folder
from train.evaluation.results import folder_of
from train.evaluation.results_dir import Writer, as_json, as_jsonl, exclusive, fingerprint_of, write_results
from train.formatting import format_count
from train.progress import progress_bar
from train.recipe import ModelSection, Source
from train.reporting.markdown import truncate_middle
from train.reporting.plots import BASELINE_COLOR, COLOR, BarSeries, bar_plot
from train.storage.local_paths import parse_path_or_id

if TYPE_CHECKING:
    from train.data.sources.formats import RowError
    from train.system_gain.metric import SystemGain
    from train.system_gain.variants import Label, LabelledConversation, VariantRows

HEADING = "## System gain"
_MAX_BARS = 30
_RECORDED_OPTIONS = ("split", "ignore", "template", "system_role", "others", "limit", "seed")


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "gain", help="log-likelihood gain of answers under their own system message", description=__doc__
    )
    parser.add_argument(
        "--model", type=parse_path_or_id, required=True, help="folder or hub id of a model or an adapter"
    )
    parser.add_argument("--before", type=parse_path_or_id, help="the model before training, measured on the same rows")
    parser.add_argument(
        "--data",
        type=parse_path_or_id,
        required=True,
        nargs="+",
        help="rows with answers: any source that a recipe takes",
    )
    parser.add_argument("--split", default="train", help="the split of data that has several (default train)")
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="NAME",
        help="columns and keys of messages to ignore, as `ignore` of a recipe's source",
    )
    parser.add_argument(
        "--template",
        type=parse_path_or_id,
        help="as chat.template of a recipe (default: the one that --model was saved with)",
    )
    parser.add_argument(
        "--system-role",
        default="native",
        choices=("native", "merge_into_user", "turn"),
        help="as chat.system_role of a recipe (default native: a model trained here has its policy in its template)",
    )
    parser.add_argument(
        "--others", type=positive_int, default=2, help="maximum number of other messages for each row (default 2)"
    )
    parser.add_argument("--limit", type=positive_int, help="maximum number of rows, sampled by --seed (default all)")
    parser.add_argument(
        "--group", nargs="+", default=[], metavar="COLUMN", help="more columns of the data to group the figures by"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="precision (default float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--rows",
        action="store_true",
        help="also show the rows that ignore their message: their number by label, those of the smallest gain, and "
        "gain_histogram.png",
    )
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help="tokens at a time (default 8192)")
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="seed of the other messages and the intervals (default 0)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file of the figures; gain.png goes beside it (default gain.json in the folder of --model)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the figures, the plot and the section of report.md. Raises UserError."""
    file: Path = options.json or Path(options.model) / "gain.json"
    if not options.json:
        require_results_folder("--model", options.model, "For a hub id, add --json FILE.")
    for option, model in (("--model", options.model), ("--before", options.before)):
        if model:
            require_model(option, model)
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise UserError(f"--json {file}: must be a file in an existing folder")
    with exclusive(file.parent, "gain"):
        _measure_all(options, file)


def _measure_all(options: argparse.Namespace, file: Path) -> None:
    names = {"before": options.before, "after": options.model}
    if not options.before:
        names = {Path(options.model).name: options.model}
    variants, texts = make_rows(options, [*names.values()])
    for kind, count in variants.dropped.items():
        print(f"skipped {format_count(count, 'row')}: {kind} (first: {variants.examples[kind]})", flush=True)

    from train.system_gain.metric import render_table

    measured: dict[str, SystemGain] = {}
    for name, model in names.items():
        measured[name], dtype = _measure(model, variants, file, options)
    change = measured["after"].change_from(measured["before"], seed=options.seed) if options.before else None
    record: dict[str, Any] = {
        "data": options.data,
        "fingerprint": texts,
        "left_out": dict(variants.dropped),
        "options": {
            **{key: getattr(options, key) for key in _RECORDED_OPTIONS},
            "dtype": dtype,
        },
        "models": {
            name: {"model": names[name], "folder": folder_of(names[name]), **gain.record()}
            for name, gain in measured.items()
        },
    }
    if change:
        record["change"] = [
            {"of": label and label[0], "is": label and label[1], **figures.record()}
            for label, figures in change.items()
        ]
    rows = f"{file.stem}_rows.jsonl"
    text = f"{HEADING}\n\n{_describe_rows(variants, measured)}\n\n{render_table(measured, change)}"
    section = f"{text}\n![gain](gain.png)\n"
    files: dict[str, Writer] = {
        rows: as_jsonl(row_records(variants.rows, measured)),
        file.name: as_json(record),
        "gain.png": partial(plot_gain, measured),
    }
    if options.rows:
        files["gain_histogram.png"] = partial(plot_histogram, measured)
        listed = rows_section(variants.rows, measured)
        text, section = f"{text}\n{listed}", f"{section}\n{listed}\n![histogram](gain_histogram.png)\n"
    write_results(file.parent, files, heading="" if options.json else HEADING, section=section)
    print(text)
    print(f"figures: {file}; figures of each row: {file.with_name(rows)}; plot: {file.with_name('gain.png')}")


def make_rows(options: argparse.Namespace, models: list[str]) -> "tuple[VariantRows, str]":
    """Return the rows to measure and their fingerprint, tokenized for the last of `models`.

    Raises UserError, also if the vocabularies of the models differ.
    """
    from pydantic import ValidationError

    from train.data.tokens.workers import RowTokenizer
    from train.evaluation.models.local import apply_chat_options, load_tokenizer_of
    from train.system_gain.variants import LabelledConversation, make_variants, read_labelled_conversations

    with replace_in_errors({"--model": "--model or --before"}):
        tokenizers = {model: load_tokenizer_of(model) for model in models}
    tokenizer = tokenizers[models[-1]]
    for model, other in tokenizers.items():
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--before {model}: its vocabulary differs from that of {models[-1]}, so the two cannot be measured on "
                "the same rows. Measure each by itself."
            )
    try:
        sources = [Source(path=path, split=options.split, ignore=tuple(options.ignore)) for path in options.data]
    except ValidationError as error:
        raise UserError(f"--data or --split: {error.errors()[0]['msg']}") from error
    apply_chat_options(tokenizer, options.template, options.system_role)
    rows = read_labelled_conversations(sources, options.group)
    columns = {column for row in rows if isinstance(row, LabelledConversation) for column, _ in row.labels}
    for column in options.group:
        if column not in columns:
            raise UserError(f"--group {column}: no row has text in a column of that name")
    with progress_bar("tokenizing answers", unit="rows") as tokenizing:
        variants = make_variants(
            rows,
            RowTokenizer(tokenizer, "assistant"),
            others=options.others,
            limit=options.limit,
            max_length=min((positions for positions in map(_max_positions, models) if positions), default=None),
            seed=options.seed,
            on_progress=tokenizing.advance,
        )
    if not variants.rows:
        reasons = "; ".join(f"{count:,}: {kind}" for kind, count in variants.dropped.items()) or "there are none"
        raise UserError(
            f"--data {' '.join(options.data)}: no row can be measured ({reasons}). Give rows with answers and at least "
            "two different system messages."
        )
    return variants, fingerprint_rows(rows, variants)


def fingerprint_rows(rows: "Sequence[LabelledConversation | tuple[str, RowError]]", variants: "VariantRows") -> str:
    """Return a checksum of the texts of all rows and of the choice of rows, by which `compare` matches two results.

    It does not depend on the places of the rows. All rows count, as other messages are sampled from all of them.
    """
    from train.system_gain.variants import LabelledConversation

    measured = {row.place for row in variants.rows}
    contents = [
        [row.conversation.messages, row.conversation.tools, row.conversation.place in measured]
        if isinstance(row, LabelledConversation)
        else None
        for row in rows
    ]
    return fingerprint_of(contents)


def _max_positions(model: str) -> int | None:
    """Return the context length of a model, or of an adapter's base. Raises UserError if it has no config."""
    from train.evaluation.models.local import base_of
    from train.model.load import load_config

    with replace_in_errors({"model.name_or_path": f"--model or --before {model}"}):
        config = load_config(ModelSection(name_or_path=base_of(model) or model)).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _measure(name: str, variants: "VariantRows", file: Path, options: argparse.Namespace) -> "tuple[SystemGain, str]":
    """Return the figures of one model and its dtype."""
    from train.evaluation.models.local import fingerprint
    from train.model.load import load_saved
    from train.system_gain.metric import system_gain
    from train.system_gain.score_cache import ScoreCache

    model = load_saved(name, options.dtype)
    total = sum(len(variant) for row in variants.rows for variant in row.all)
    key = json.dumps([fingerprint(name), str(model.dtype)])
    with (
        ScoreCache(file.with_name("gain_scores.jsonl"), key) as scores,
        progress_bar(f"scoring answers with {name}", total=total, unit="answers") as scoring,
    ):
        gain = system_gain(
            model,
            variants.rows,
            tokens_per_batch=options.batch_tokens,
            seed=options.seed,
            scores=scores,
            on_progress=scoring.advance,
        )
    return gain, str(model.dtype).removeprefix("torch.")


def _describe_rows(variants: "VariantRows", measured: "dict[str, SystemGain]") -> str:
    gain = next(iter(measured.values()))
    tokens = sum(row.tokens for row in variants.rows)
    rows = format_count(gain.overall.rows, "row")
    text = f"Reference answers of {tokens / len(variants.rows):.0f} tokens on average; "
    text += f"{gain.with_siblings:,} of {rows} against other messages of the same instruction"
    text += ", the rest against those of other rows." if gain.with_siblings < gain.overall.rows else "."
    if gain.other_tokens:
        text += f" In {format_count(gain.other_tokens, 'row')} the answer's tokens depend on the message before it."
    return text


def plot_gain(measured: "dict[str, SystemGain]", path: Path) -> None:
    """Save a PNG of the gain over other messages with its interval, overall and for the largest groups."""
    first = next(iter(measured.values()))
    largest = sorted(first.groups, key=lambda label: -first.groups[label].rows)[:_MAX_BARS]
    labels: list[Label | None] = [None, *sorted(largest)]
    colors = [BASELINE_COLOR, COLOR] if len(measured) == 2 else [COLOR]
    series = []
    for color, (name, gain) in zip(colors, measured.items(), strict=True):
        gains = [(gain.overall if label is None else gain.groups[label]).gain for label in labels]
        series.append(BarSeries([(estimate.mean, estimate.low, estimate.high) for estimate in gains], name, color))
    names = ["all rows" if label is None else truncate_middle(f"{label[0]}: {label[1]}", 48) for label in labels]
    xlabel = "gain of the answer's log-likelihood over other system messages, nats per token (95 %)"
    with bar_plot(path, "System gain", xlabel, names, series) as axes:
        axes.axvline(0, color="black", linewidth=0.8)
