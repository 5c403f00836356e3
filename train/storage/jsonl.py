"""JSON lines."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl in their order; lines that a crash left incomplete are skipped."""
    metrics = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return metrics
