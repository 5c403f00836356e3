"""TODO: train.storage.jsonl."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in the order of the steps; half a line, left by a crash, is passed over."""
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return metrics
