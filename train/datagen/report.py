"""Report of a run: report.md and report.json, with the sections that SYSGEN and the collection share."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.llm.failures import to_table_cells
from train.reporting.markdown import count_section, format_usage


def write_report(folder: Path, facts: Mapping[str, Any], sections: Iterable[str]) -> Path:
    """Write report.json with the facts and report.md with the sections into `folder`; return the path of report.md."""
    (folder / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    path = folder / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def warning_section(facts: Mapping[str, Any]) -> Iterable[str]:
    """Yield a paragraph for each warning."""
    yield from (f"**Warning: {warning}**" for warning in facts["warnings"])


def failure_section(facts: Mapping[str, Any]) -> Iterable[str]:
    """Yield the section with the errors of requests that failed; nothing if none did."""
    yield from count_section("Failed requests", "error of the server", to_table_cells(facts["unanswered"]))


def usage_section(facts: Mapping[str, Any], seconds: float | None) -> Iterable[str]:
    """Yield the section with requests and tokens. `seconds`: from the first request to the last answer."""
    yield "## Usage"
    yield format_usage(facts["spent"], seconds)
