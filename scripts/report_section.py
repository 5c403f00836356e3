"""One section of a report.md, written anew where it stands and leaving all others as they are."""

import re
from pathlib import Path

from train.whole_files import replacing, write_text


def put_section(report: Path, heading: str, text: str) -> None:
    """Put `text`, which begins with the line `heading` ("## ..."), in the place of the section that did, or last."""
    old = report.read_text(encoding="utf-8") if report.is_file() else ""
    before, found, rest = f"\n{old}".partition(f"\n{heading}\n")
    behind = re.search(r"^## ", rest, re.MULTILINE) if found else None
    parts = [before.strip("\n"), text.strip("\n"), rest[behind.start() :].strip("\n") if behind else ""]
    with replacing(report) as [aside]:
        write_text(aside, "\n\n".join(part for part in parts if part) + "\n")
