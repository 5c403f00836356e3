r"""Tasks of lm-evaluation-harness with the trained chat template.

    python scripts/evaluate.py harness \
        --model outputs/smollm2-135m-quickstart --tasks sysgen

`sysgen` stands for the eight unseen benchmarks of SYSGEN, `janus` for the safety and bias sets of JANUS. Writes
harness.json, harness_rows.jsonl and a section of report.md. The results of all requests are kept in harness_requests,
so the same command continues a killed run.
"""

import argparse
import difflib
import hashlib
import importlib.metadata
import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from train.cli import non_negative_int, positive_int
from train.errors import UserError
from train.evaluation.formatting import format_estimate
from train.evaluation.required_paths import require_model
from train.evaluation.results_dir import as_json, as_jsonl, exclusive, output_folder, write_results
from train.evaluation.task_groups import GROUPS, left_out, task_names
from train.formatting import format_count
from train.ifeval.punkt import missing_package, provide_punkt
from train.resampling import (
    MIN_GROUPS,
    IntervalMethod,
    explain_missing_intervals,
    missing_interval_reason,
    wilson_interval,
)
from train.storage.local_paths import describe_missing_path, parse_path_or_id

HEADING = "## Benchmarks"
_FILTERED_WARNINGS = ("`pretrained` model kwarg is not of type",)


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or group.

    - `interval`: the method of the interval, or why there is none. The mean of documents that are right or wrong has
      Wilson's interval (`train.resampling`), other metrics 1.96 of the harness's standard errors on both sides.
    - `leaves`: the tasks that a group pools; of a task, its own name.
    - `better`: "higher" or "lower", as the task defines it; None if it does not.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    interval: IntervalMethod | Literal["standard error", "none: not known"]
    of: int
    few_shot: int | None
    version: str | None
    leaves: tuple[str, ...]
    better: str | None

    @property
    def missing(self) -> str:
        """Return the reason for a missing interval, as `missing_interval_reason` gives it."""
        return missing_interval_reason(self.interval, self.of)

    def record(self) -> dict[str, Any]:
        """Return the score for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HarnessResult:
    """`scores` of tasks and groups; `rows`: the scores of each document; `requests`: the file of cached requests."""

    scores: list[TaskScore]
    rows: list[dict[str, Any]]
    requests: Path


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
        help="tasks or groups of lm-eval, or of a paper: "
        + "; ".join(f"{group} = {', '.join(tasks.values())}" for group, tasks in GROUPS.items()),
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="tasks of your own, as lm-eval's YAML")
    parser.add_argument(
        "--system-instruction", metavar="TEXT", help="a system message for every request (default none)"
    )
    parser.add_argument(
        "--few-shot", type=non_negative_int, metavar="N", help="examples before each question (default: the task's)"
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
        help="as chat.system_role of a recipe (default native: a model trained here has its policy in its template)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="requests at a time (default 16)")
    parser.add_argument("--output-dir", type=Path, help="folder for all results (default the folder of --model)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the tasks, print the table, and write figures, rows and the section of report.md. Raises UserError."""
    require_model("--model", options.model)
    if options.include_path and not options.include_path.is_dir():
        path = options.include_path
        reason = describe_missing_path(path) if not path.exists() else "that is a file."
        raise UserError(f"--include-path {path}: there is no such folder of tasks: {reason}")
    folder = output_folder(options.model, options.output_dir, remedy="For a hub id, add --output-dir FOLDER.")
    with exclusive(folder, "harness"):
        tasks = Tasks(task_names(options.tasks), options.include_path)
        result = evaluate(tasks, options, folder)
        text = section(result, options)
        files = {"harness_rows.jsonl": as_jsonl(result.rows), "harness.json": as_json(make_record(result, options))}
        write_results(folder, files, heading=HEADING, section=text)
    print(text)
    print(f"figures: {folder / 'harness.json'}; scores of each document: {folder / 'harness_rows.jsonl'}")


class Tasks:
    """The harness's tasks and those of a folder, loaded with their data.

    Raises UserError for an unknown task, and for one whose data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        provide_punkt()  # the ifeval task needs it while it loads
        try:
            from langdetect import DetectorFactory
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise missing_package(error) from error
        DetectorFactory.seed = 0
        folder = str(include_path) if include_path else None
        # Reading the harness's own 14,000 tasks takes 8 seconds, and a folder need not refer to any of them.
        self.manager = TaskManager(include_path=folder, include_defaults=False) if folder else _harness_tasks()
        self.names = list(names)
        if folder and not set(names) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=folder)
        for name in names:
            self._require(name)
        for name in names:
            self._load(name)

    def _require(self, name: str) -> None:
        if name not in self.manager.all_tasks:
            close = difflib.get_close_matches(name, self.manager.all_tasks, 3)
            suggestion = f" Did you mean {', '.join(close)}?" if close else ""
            raise UserError(
                f"--tasks {name}: neither lm-eval {importlib.metadata.version('lm-eval')} nor --include-path has "
                f"such a task or group.{suggestion}"
            )

    def _load(self, name: str) -> None:
        try:
            self.manager.load([name])
        except Exception as error:  # of the hub, of datasets, of a task's own code: there is no common class
            raise UserError(
                f"--tasks {name}: its data cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:500]}. A task whose data is on this disk can be given with "
                "--include-path; some on the hub (GPQA) require HF_TOKEN of an account that has accepted their terms."
            ) from error


@cache
def _harness_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def evaluate(tasks: Tasks, options: argparse.Namespace, folder: Path) -> HarnessResult:
    """Run the tasks on a model under its chat template. Raises UserError.

    The harness's cache in `folder` (SQLite) holds the result of each request from the moment it is known. Its keys do
    not cover the model, so the file's name covers weights, dtype and version of the harness.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from train.evaluation.models.local import fingerprint, open_tokenizer
    from train.model.load import load_saved

    logging.getLogger("lm_eval.models.huggingface").addFilter(_is_helpful)
    # Refuses a template that would lose the system message; the harness itself would drop the message.
    tokenizer = open_tokenizer(options.model, options.template, options.system_role)
    identity = [fingerprint(options.model), options.dtype, importlib.metadata.version("lm-eval")]
    digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
    requests = folder / "harness_requests" / digest
    model = load_saved(options.model, options.dtype)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        tasks=tasks.names,
        task_manager=tasks.manager,
        num_fewshot=options.few_shot,
        limit=options.limit,
        use_cache=str(requests),
        system_instruction=options.system_instruction,
        apply_chat_template=True,
        log_samples=True,
    )
    if results is None:  # on a rank other than the first
        raise UserError("a launcher started several processes. Run this command as a single process.")
    rows = _rows(results["samples"])
    return HarnessResult(_scores(results, rows), rows, Path(f"{requests}_rank0.db"))


def _is_helpful(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in _FILTERED_WARNINGS)


def _scores(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[TaskScore]:
    """Return every metric of every task, and those of every group that the harness pools."""
    scores = []
    by_document: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for row in rows:
        for name, score in row["scores"].items():
            by_document[row["task"], row["filter"], name].append(score)
    counts = {task: sizes["effective"] for task, sizes in results["n-samples"].items()}
    groups = results.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        children = groups.get(name)
        return [leaf for child in children for leaf in leaves(child)] if children else [name]

    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        of_task = leaves(task)
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # NaN: a metric of no document, as of a category of BBQ that --limit leaves out.
            if not is_number or math.isnan(value) or not filter_name or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr,{filter_name}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            documents = [score for leaf in of_task for score in by_document[leaf, filter_name, name]]
            count = sum(counts.get(leaf, 0) for leaf in of_task)
            low, high, interval = _interval(value, stderr, documents, count)
            scores.append(
                TaskScore(
                    task=task,
                    metric=name if filter_name == "none" else f"{name} ({filter_name})",
                    value=float(value),
                    stderr=stderr,
                    low=low,
                    high=high,
                    interval=interval,
                    of=count,
                    few_shot=results["n-shot"].get(task),
                    version=None if results["versions"].get(task) is None else str(results["versions"][task]),
                    leaves=tuple(of_task),
                    better={True: "higher", False: "lower"}.get(results["higher_is_better"].get(task, {}).get(name)),
                )
            )
    return scores


def _interval(
    value: float, stderr: float | None, documents: Sequence[Any], count: int
) -> tuple[float | None, float | None, IntervalMethod | Literal["standard error", "none: not known"]]:
    """Return the bounds of a metric's interval and their method. `documents`: the scores of the `count` documents."""
    if count < MIN_GROUPS:
        return None, None, "none: too few"
    right_or_wrong = all(isinstance(score, bool | int | float) and score in (0, 1) for score in documents)
    if documents and right_or_wrong and abs(fmean(documents) - value) < 1e-9:
        return *wilson_interval(fmean(documents), len(documents)), "wilson"
    if stderr is None:
        return None, None, "none: not known"
    if stderr == 0:
        return None, None, "none: all alike"
    return value - 1.96 * stderr, value + 1.96 * stderr, "standard error"


def _rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the metrics of each document, each a number or (of IFEval's constraints) several."""
    return [
        {
            "task": task,
            "document": sample["doc_id"],
            "hash": sample["doc_hash"],
            "prompt": sample["prompt_hash"],
            "filter": sample["filter"],
            "scores": {name: sample[name] for name in sample["metrics"] if _is_score(sample[name])},
        }
        for task, of_task in samples.items()
        for sample in of_task
    ]


def _is_score(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, bool | int | float) for part in value)
    return isinstance(value, bool | int | float)


def make_record(result: HarnessResult, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record for harness.json."""
    names = ("system_instruction", "template", "system_role", "few_shot", "limit", "dtype")
    return {
        "kind": "harness",
        "model": options.model,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "options": {
            "chat_template": True,
            "few_shot_as_turns": True,
            **{name: getattr(options, name) for name in names},
        },
        "not_measured": left_out(options.tasks),
        "scores": [score.record() for score in result.scores],
    }


def section(result: HarnessResult, options: argparse.Namespace) -> str:
    """Return the section of report.md: the settings and a line for each metric."""
    settings = f"lm-eval {importlib.metadata.version('lm-eval')}, with the chat template and few-shot examples as turns"
    settings += (
        f", system message `{options.system_instruction}`" if options.system_instruction else ", no system message"
    )
    if options.limit:
        settings += f"; the first {format_count(options.limit, 'document')} of each task, not comparable with published"
        settings += " figures"
    lines = [
        HEADING,
        "",
        f"{settings}. Intervals (95 %) are Wilson's where documents are right or wrong, else 1.96 standard errors.",
        "",
        "| task | metric | few-shot | documents | value | better |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_table_row(score) for score in result.scores]
    lines += [f"\n{name} is not measured: {reason}" for name, reason in left_out(options.tasks).items()]
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "documents")) else []
    return "\n".join(lines) + "\n"


def _table_row(score: TaskScore) -> str:
    value = format_estimate(score.value, score.low, score.high, score.missing, digits=4)
    few_shot = "" if score.few_shot is None else str(score.few_shot)
    return f"| {score.task} | {score.metric} | {few_shot} | {score.of:,} | {value} | {score.better or ''} |"
