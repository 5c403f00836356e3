r"""Tasks of lm-evaluation-harness with the trained chat template.

    python scripts/evaluate.py harness \
        --model outputs/smollm2-135m-quickstart --tasks sysgen

`sysgen` is the eight unseen benchmarks of SYSGEN. Writes harness.json, harness_rows.jsonl and a section into report.md.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.cli import non_negative_int, positive_int
from train.errors import UserError
from train.evaluation.folders import require_model, require_results_folder
from train.evaluation.results_dir import exclusive
from train.formatting import format_count
from train.reporting.markdown import replace_section
from train.resampling import explain_missing_intervals
from train.storage.atomic_write import atomic_write, write_text
from train.storage.local_paths import describe_missing_path, parse_path_or_id

if TYPE_CHECKING:
    from train.evaluation.harness import HarnessResult, Score

HEADING = "## Benchmarks"


def add_to(commands: Any) -> None:
    """Add the command to those of evaluate.py."""
    parser = commands.add_parser("harness", help="benchmarks through lm-evaluation-harness", description=__doc__)
    parser.add_argument(
        "--model", type=parse_path_or_id, required=True, help="folder or hub id of a model or an adapter"
    )
    parser.add_argument(
        "--tasks",
        required=True,
        nargs="+",
        metavar="TASK",
        help="tasks or groups of lm-eval; sysgen is SYSGEN's eight: mmlu, mmlu_pro, arc_challenge, gpqa_main_zeroshot, "
        "hellaswag, ifeval, mathqa, bbh",
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="tasks of your own, as lm-eval's YAML")
    parser.add_argument(
        "--system-instruction", metavar="TEXT", help="a system message for every request (default none)"
    )
    parser.add_argument(
        "--few-shot",
        type=non_negative_int,
        metavar="N",
        help="examples before each question (default what each task defines)",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="number of documents of each task, from the first (default all)"
    )
    parser.add_argument(
        "--template", type=parse_path_or_id, help="as chat.template of a recipe (default: the model's own)"
    )
    parser.add_argument(
        "--system-role",
        default="native",
        choices=("native", "merge_into_user", "turn"),
        help="as chat.system_role of a recipe (default native: a model that we trained has its policy in its template)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="requests at a time (default 16)")
    parser.add_argument("--output-dir", type=Path, help="where everything goes (default the folder of --model)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the tasks, print the table, write figures, rows and the section of report.md. Raises UserError."""
    if options.output_dir is None:
        require_results_folder("--model", options.model, "For a hub id, say --output-dir FOLDER as well.")
    require_model("--model", options.model)
    if options.include_path and not options.include_path.is_dir():
        where = describe_missing_path(options.include_path) if not options.include_path.exists() else "that is a file."
        raise UserError(f"--include-path {options.include_path}: there is no such folder of tasks: {where}")
    folder: Path = options.output_dir or Path(options.model)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"--output-dir {folder}: can't be made: {fault.strerror}") from fault
    with exclusive(folder, "harness"):
        _measure(options, folder)


def _measure(options: argparse.Namespace, folder: Path) -> None:
    from train.evaluation.harness import Tasks, evaluate, task_names

    tasks = Tasks(task_names(options.tasks), options.include_path)
    scored = evaluate(
        tasks,
        options.model,
        folder,
        template=options.template,
        system_role=options.system_role,
        system_instruction=options.system_instruction,
        dtype=options.dtype,
        batch_size=options.batch_size,
        few_shot=options.few_shot,
        limit=options.limit,
    )
    text = section(scored, options)
    try:
        write(scored, options, folder)
        replace_section(folder / "report.md", HEADING, text)
    except OSError as fault:
        raise UserError(f"{folder}: can't be written: {fault.strerror}") from fault
    print(text)
    print(f"the figures are in {folder / 'harness.json'}, each document's in {folder / 'harness_rows.jsonl'}")


def write(scored: "HarnessResult", options: argparse.Namespace, folder: Path) -> None:
    """harness.json and harness_rows.jsonl."""
    record = {
        "kind": "harness",
        "model": options.model,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "options": {
            "chat_template": True,
            "few_shot_as_turns": True,
            **{
                name: getattr(options, name)
                for name in ("system_instruction", "template", "system_role", "few_shot", "limit", "dtype")
            },
        },
        "scores": [score.record() for score in scored.scores],
    }
    with atomic_write(folder / "harness_rows.jsonl", folder / "harness.json") as [lines, figures]:
        write_text(lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored.rows))
        write_text(figures, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def section(scored: "HarnessResult", options: argparse.Namespace) -> str:
    """The section of report.md: how it was measured and a line for each metric."""
    about = f"lm-eval {importlib.metadata.version('lm-eval')}, with the chat template and few-shot examples as turns"
    about += f", system message `{options.system_instruction}`" if options.system_instruction else ", no system message"
    about += (
        f"; the first {format_count(options.limit, 'document')} of each task, so no figure to publish"
        if options.limit
        else ""
    )
    lines = [
        HEADING,
        "",
        f"{about}. Intervals (95 %) are Wilson's where documents are right or wrong, else 1.96 standard errors.",
        "",
    ]
    lines += ["| task | metric | few-shot | documents | value |", "|---|---|---|---|---|"]
    lines += [_line(score) for score in scored.scores]
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "documents")) else []
    return "\n".join(lines) + "\n"


def _line(score: "Score") -> str:
    interval = f" ({score.missing})" if score.missing else ""
    if score.low is not None and score.high is not None:
        interval = f" [{score.low:.4f}, {score.high:.4f}]"
    few_shot = "" if score.few_shot is None else str(score.few_shot)
    return f"| {score.task} | {score.metric} | {few_shot} | {score.of:,} | {score.value:.4f}{interval} |"
