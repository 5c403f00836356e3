"""Markdown of reports: tables, code blocks and sections of report.md."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from train.formatting import duration
from train.storage.atomic_write import atomic_write, write_text


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table with the first column aligned left and the others right."""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def format_share(part: int, total: int) -> str:
    """Return a percentage such as 12.3%; empty if `total` is 0."""
    return f"{part / total:.1%}" if total else ""


def count_section(
    title: str, label: str, counts: Mapping[str, int], total: int | None = None, total_label: str = "", remark: str = ""
) -> Iterable[str]:
    """Yield a section with a table of counts; nothing if `counts` is empty.

    Args:
        title: heading of the section.
        label: header of the first column.
        counts: occurrences by name.
        total: adds a column with the shares of this number.
        total_label: header of that column.
        remark: text above the table.
    """
    if not counts:
        return
    yield f"### {title}"
    if remark:
        yield remark
    header = (label, "times") if total is None else (label, "times", total_label)
    rows = [(name, f"{count:,}", format_share(count, total or 0))[: len(header)] for name, count in counts.items()]
    yield format_table(header, rows)


def format_usage(usage: Mapping[str, Any], seconds: float | None) -> str:
    """Return a table of the requests, tokens and seconds of each stage.

    `seconds`: from the first request to the last answer; None if unknown.
    """
    rows = [
        (
            stage,
            f"{counts['requests']:,}",
            f"{counts['prompt_tokens']:,}",
            f"{counts['completion_tokens']:,}",
            f"{counts['seconds'] / counts['requests']:.2f}",
        )
        for stage, counts in usage.items()
    ]
    text = format_table(("stage", "answers", "prompt tokens", "completion tokens", "seconds per answer"), rows)
    text += "\n\nEqual requests are sent once and counted for each row that uses the answer."
    if seconds is None:
        return text
    return f"{text}\n\nFrom the first request to the last answer, interruptions included: {duration(seconds)}."


def code_block(text: str) -> str:
    """Return `text` as a code block, because models write Markdown, HTML and tags."""
    backticks = max((len(list(run)) for character, run in groupby(text) if character == "`"), default=0)
    fence = "`" * max(3, 1 + backticks)
    return f"{fence}text\n{text}\n{fence}"


def quote_line(text: str) -> str:
    """Return `text`, or its first 300 characters, as code on one line of Markdown."""
    shown = text if len(text) <= 300 else text[:300] + " ..."
    return "`" + shown.replace("`", "'").replace("\n", " ⏎ ") + "`"


def truncate_middle(text: str, limit: int) -> str:
    """Return `text` on one line of at most `limit` characters, with the middle replaced by `...`."""
    text = " ".join(text.split())
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def replace_section(report: Path, heading: str, text: str) -> None:
    """Replace the section of `report` under the line `heading` ("## ...") with `text`, or append it if there is none.

    `text` starts with `heading`.
    """
    old = report.read_text(encoding="utf-8") if report.is_file() else ""
    before, separator, rest = f"\n{old}".partition(f"\n{heading}\n")
    following = re.search(r"^## ", rest, re.MULTILINE) if separator else None
    parts = [before.strip("\n"), text.strip("\n"), rest[following.start() :].strip("\n") if following else ""]
    with atomic_write(report) as [temporary]:
        write_text(temporary, "\n\n".join(part for part in parts if part) + "\n")
