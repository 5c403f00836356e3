"""JSON Lines files."""

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, in order; lines that a crash cut short are skipped."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects
