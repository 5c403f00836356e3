"""Tasks of lm-evaluation-harness on a checkpoint with its trained chat template; what was scored is never lost.

The harness's own cache of requests (a SQLite file beside the results) holds each request's result from the moment it is
there, so that a killed run goes on where it was. Its keys name the request alone; the file's name therefore says which
weights, dtype and version of the harness answered.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from train.errors import UserError
from train.evaluation.ifeval.punkt import missing_package, provide_punkt
from train.resampling import MIN_GROUPS, IntervalMethod, missing_interval_reason, wilson_interval

SYSGEN = {
    "MMLU": "mmlu",
    "MMLU-Pro": "mmlu_pro",
    "ARC-c": "arc_challenge",
    "GPQA": "gpqa_main_zeroshot",
    "HellaSwag": "hellaswag",
    "IFEval": "ifeval",
    "MathQA": "mathqa",
    "BBH": "bbh",
}
"""SYSGEN's unseen benchmarks -> the harness's tasks.

The paper names neither its tasks (GPQA's and BBH's come in several variants) nor its few-shot counts: these are the
harness's own names, with the counts that it defines for them."""

_NOT_HELPFUL = ("`pretrained` model kwarg is not of type",)


@dataclass(frozen=True)
class Score:
    """One metric of a task or group.

    The interval of a mean of documents that are right or wrong is Wilson's (`train.resampling`), of other metrics
    `value` plus and minus 1.96 of the harness's standard errors. `interval`: which of them, or why there is none.
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
    """Of a group, the tasks that it pools; of a task, its own name."""

    @property
    def missing(self) -> str:
        """Return the reason for a missing interval, as `missing_interval_reason` gives it."""
        return missing_interval_reason(self.interval, self.of)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HarnessResult:
    """`scores` of tasks and groups; `rows`: what each document scored; `requests`: the file that holds the requests."""

    scores: list[Score]
    rows: list[dict[str, Any]]
    requests: Path


def task_names(given: Sequence[str]) -> list[str]:
    """The harness's names for what was asked for: `sysgen` is eight of them. Each once, in the order given."""
    return list(dict.fromkeys(name for item in given for name in ([*SYSGEN.values()] if item == "sysgen" else [item])))


class Tasks:
    """The harness's tasks and those of a folder, loaded with their data.

    Raises UserError for a task that there isn't, and for one whose data can't be had.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        if include_path and not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: there is no such folder of tasks")
        provide_punkt()  # ifeval's task asks for it as it is loaded
        try:
            from langdetect import DetectorFactory
            from lm_eval.tasks import TaskManager
        except ImportError as fault:
            raise missing_package(fault) from fault
        DetectorFactory.seed = 0
        folder = str(include_path) if include_path else None
        # To read the harness's own 14,000 tasks takes 8 seconds, and a folder needn't name any of them.
        self.manager = TaskManager(include_path=folder, include_defaults=False) if folder else _harness_tasks()
        self.names = list(names)
        if folder and not set(names) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=folder)
        for name in names:
            self._must_exist(name)
        for name in names:
            self._load(name)

    def _must_exist(self, name: str) -> None:
        if name not in self.manager.all_tasks:
            close = difflib.get_close_matches(name, self.manager.all_tasks, 3)
            meant = f" Did you mean {', '.join(close)}?" if close else ""
            raise UserError(
                f"--tasks {name}: lm-eval {importlib.metadata.version('lm-eval')} has no such task or group, nor has "
                f"--include-path.{meant}"
            )

    def _load(self, name: str) -> None:
        try:
            self.manager.load([name])
        except Exception as fault:  # of the hub, of datasets, of a task's own code: there is no one kind
            raise UserError(
                f"--tasks {name}: its data can't be had: {type(fault).__name__}: {' '.join(str(fault).split())[:500]}. "
                "A task whose data is on this disk can be given with --include-path; some on the hub (GPQA) want "
                "HF_TOKEN of someone who has accepted their terms."
            ) from fault


@cache
def _harness_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def evaluate(
    tasks: Tasks,
    model: str,
    folder: Path,
    *,
    template: str | None = None,
    system_role: Literal["native", "merge_into_user", "turn"] = "native",
    system_instruction: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    few_shot: int | None = None,
    limit: int | None = None,
) -> HarnessResult:
    """Run the tasks on a checkpoint, under its chat template. Raises UserError."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from train.evaluation.models.local import fingerprint, open_tokenizer
    from train.model.load import load_saved

    logging.getLogger("lm_eval.models.huggingface").addFilter(_is_helpful)
    # Refuses a template that would lose the system message, where the harness drops it.
    tokenizer = open_tokenizer(model, template, system_role)
    told_apart = [fingerprint(model), dtype, importlib.metadata.version("lm-eval")]
    digest = hashlib.blake2b(json.dumps(told_apart).encode(), digest_size=8).hexdigest()
    requests = folder / "harness_requests" / digest
    loaded = HFLM(pretrained=load_saved(model, dtype), tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=loaded,
        tasks=tasks.names,
        task_manager=tasks.manager,
        num_fewshot=few_shot,
        limit=limit,
        use_cache=str(requests),
        system_instruction=system_instruction,
        apply_chat_template=True,
        log_samples=True,
    )
    if found is None:  # a rank that isn't the first
        raise UserError("run it as one process: it was started by a launcher of several")
    rows = _rows(found["samples"])
    return HarnessResult(_scores(found, rows), rows, Path(f"{requests}_rank0.db"))


def _is_helpful(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in _NOT_HELPFUL)


def _scores(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Every metric of every task and group. A group has those that the harness pools."""
    scores = []
    of_documents: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for row in rows:
        for name, score in row["scores"].items():
            of_documents[row["task"], row["filter"], name].append(score)
    counts = {task: given["effective"] for task, given in found["n-samples"].items()}
    groups = found.get("group_subtasks", {})

    def leaves(name: str) -> list[str]:
        children = groups.get(name)
        return [leaf for child in children for leaf in leaves(child)] if children else [name]

    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        of = leaves(task)
        for key, value in metrics.items():
            name, _, kept = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or not kept or name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr,{kept}")
            known = isinstance(stderr, int | float)
            documents = [score for leaf in of for score in of_documents[leaf, kept, name]]
            count = sum(counts.get(leaf, 0) for leaf in of)
            low, high, interval = _interval(value, float(stderr) if known else None, documents, count)
            scores.append(
                Score(
                    task=task,
                    metric=name if kept == "none" else f"{name} ({kept})",
                    value=float(value),
                    stderr=float(stderr) if known else None,
                    low=low,
                    high=high,
                    interval=interval,
                    of=count,
                    few_shot=found["n-shot"].get(task),
                    version=None if found["versions"].get(task) is None else str(found["versions"][task]),
                    leaves=tuple(of),
                )
            )
    return scores


def _interval(
    value: float, stderr: float | None, documents: Sequence[Any], count: int
) -> tuple[float | None, float | None, IntervalMethod | Literal["standard error", "none: not known"]]:
    """The ends of a metric's interval, and what they are. `documents`: its scores of each of `count`, where kept."""
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
    """For each document its metrics, each a number or (of IFEval's constraints) several."""
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
    return isinstance(value, bool | int | float) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, bool | int | float) for one in value)
    )
