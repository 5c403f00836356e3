r"""Instruction hierarchy: system messages against a user, a document or a tool that asks for something else.

    python scripts/evaluate.py hierarchy --model outputs/smollm2-135m-quickstart --batch-size 32

Asks the rows of a built-in set and judges each answer by a program, twice: the message held, and the question was
answered. Settings stand side by side: the user asks for nothing (reference), for the same (aligned) or for the opposite
(conflict); a quoted text or a tool result asks for the opposite (injected); the user asks for a secret of the message
(extraction), or for what the message allows (permitted). Writes hierarchy.json, hierarchy_rows.jsonl, hierarchy.png and
a section of report.md. Answers are kept in hierarchy.sqlite, so the same command continues a run that was stopped.
--tensortrust and --realguardrails measure two published sets too.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.evaluation.answer_endings import summarize_unanswered
from train.evaluation.command_options import add_options, load_settings
from train.evaluation.hierarchy.figures import compute_figures
from train.evaluation.hierarchy.options import HierarchyOptions
from train.evaluation.hierarchy.pressure_set import (
    NAME,
    BeforeAsking,
    ask,
    judge,
    record_rows,
)
from train.evaluation.hierarchy.report import HEADING, details_of, plot_parts, section, settings_of
from train.evaluation.hierarchy.results_of_set import SetResults
from train.evaluation.hierarchy.system_ifeval import read_gap
from train.evaluation.judge_options import contact_judge_once
from train.evaluation.results_dir import Writer, as_json, as_jsonl, exclusive, write_results
from train.pressure.evaluation_set import build_rows
from train.pressure.selection import select_rows
from train.pressure.tactics import SETTINGS

if TYPE_CHECKING:
    from train.evaluation.models.responses import OpenModel


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser(
        "hierarchy", help="system messages against users and texts that ask for something else", description=__doc__
    )
    add_options(parser, HierarchyOptions)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask, judge, and write rows, figures, plot and report. Raises UserError."""
    config = load_settings(options, HierarchyOptions)
    config.refuse_extra()
    config.refuse_unused()
    folder = config.results_folder()
    with exclusive(folder, "hierarchy"):
        _write(config, folder, measure_sets(config, folder))


def measure_sets(config: HierarchyOptions, folder: Path) -> list[SetResults]:
    """Ask and judge the built-in set and the published sets that the options name. Raises UserError."""
    from train.evaluation.hierarchy.published_sets import measure_published_sets, read_published_sets
    from train.evaluation.models.responses import open_model

    published = read_published_sets(config)
    contact = contact_judge_once(config, config.wait_for_server)
    journal = folder / "hierarchy.sqlite"
    with open_model(config.local_or_served()) as model:
        of_ours = measure_pressure_set(config, model, journal, contact)
        others = measure_published_sets(config, published, model, journal, before_asking=contact, seed=config.seed)
    return [of_ours, *others]


def measure_pressure_set(
    config: HierarchyOptions, model: "OpenModel", journal: Path, before_asking: BeforeAsking
) -> SetResults:
    """Ask and judge the built-in set."""
    settings = [setting for setting in SETTINGS if setting in config.settings]
    rows = select_rows(build_rows(), settings, None if config.split == "all" else config.split, config.rows)
    asked = ask(config, rows, model, journal, before_asking)
    lines = judge(rows, asked)
    figures = compute_figures(lines, config.seed)
    record = {"data": record_rows(rows, asked), **figures.record()}
    failures = [(line["key"], line["why"]) for line in lines if line["why"]]
    unanswered = summarize_unanswered("row", "count as neither held nor answered", failures)
    text = settings_of(record["data"], config.split)
    return SetResults(NAME, record, lines, figures.parts(), text, details_of(figures, lines), unanswered)


def _write(config: HierarchyOptions, folder: Path, sets: list[SetResults]) -> None:
    decoding = config.decoding()
    model_files = config.model_files()
    gap, why_no_gap = read_gap(folder, config.model, model_files)
    parts = [part for of_set in sets for part in of_set.parts] + gap
    record: dict[str, Any] = {
        "kind": "hierarchy",
        "model": config.model,
        "model_files": model_files,
        "split": config.split,
        "decoding": {
            "max_new_tokens": decoding.max_tokens if decoding.limit_name else None,
            "temperature": decoding.temperature,
            **decoding.extra,
        },
        "respondent": {name: getattr(config, name) for name in ("template", "system_role", "engine", "dtype")},
        "seed": config.seed,
        **{of_set.name: of_set.record for of_set in sets},
        "table": [part.record() for part in parts],
    }
    text = section(record, sets, parts, why_no_gap)
    files: dict[str, Writer] = {
        "hierarchy_rows.jsonl": as_jsonl(line for of_set in sets for line in of_set.rows),
        "hierarchy.json": as_json(record),
        "hierarchy.png": partial(plot_parts, parts),
    }
    write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"figures: {folder / 'hierarchy.json'}; rows: {folder / 'hierarchy_rows.jsonl'}")
    for of_set in sets:
        if of_set.warning:
            print(f"warning: {of_set.warning.rstrip('.')}. The same command requests again what got no answer.")
