"""Lines of a run's evaluations in a JSON Lines file beside metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.storage.atomic_write import atomic_write, write_text
from train.storage.jsonl import read_json_lines


def replace_lines(path: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """Append the lines of an evaluation to those of earlier steps of this run. A failure is a warning.

    Lines after the checkpoint that a run resumes from are replaced, as those steps are measured again. A run that
    starts from the beginning in the folder of another keeps none of its lines: metrics.jsonl has no evaluation at
    their steps.
    """
    try:
        kept = [line for line in _read_evaluated(path) if line["step"] < step]
        with atomic_write(path) as [unfinished]:  # a full disk must not cost the lines that were there
            write_text(unfinished, "".join(json.dumps(line) + "\n" for line in [*kept, *lines]))
    except OSError as error:
        print(f"warning: {path} can't be written: {error.strerror}", flush=True)


def _read_evaluated(path: Path) -> list[dict[str, Any]]:
    """Return the lines whose steps have an evaluation in metrics.jsonl; all without a metrics.jsonl."""
    lines = read_json_lines(path) if path.is_file() else []
    metrics = path.with_name("metrics.jsonl")
    if not metrics.is_file():
        return lines
    steps = {line["step"] for line in read_json_lines(metrics) if "eval_runtime" in line}
    return [line for line in lines if line["step"] in steps]
