"""What reports in Markdown are made of: tables, quotations, and pictures beside them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.formatting import duration
from train.storage.atomic_write import atomic_write, write_text


def format_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def format_share(part: int, whole: int) -> str:
    """12.3%, or nothing of nothing."""
    return f"{part / whole:.1%}" if whole else ""


def count_section(
    title: str, what: str, counts: Mapping[str, int], of: int | None = None, of_what: str = "", remark: str = ""
) -> Iterable[str]:
    """A section with a table of counts; nothing where nothing was counted."""
    if not counts:
        return
    yield f"### {title}"
    if remark:
        yield remark
    if of is None:
        yield format_table((what, "times"), [(name, f"{count:,}") for name, count in counts.items()])
    else:
        yield format_table(
            (what, "times", of_what), [(name, f"{count:,}", format_share(count, of)) for name, count in counts.items()]
        )


def format_usage(spent: Mapping[str, Any], seconds: float | None) -> str:
    """What the answers of each stage took. `seconds`: from the first request to the last answer."""
    rows = [
        (
            stage,
            f"{of['requests']:,}",
            f"{of['prompt_tokens']:,}",
            f"{of['completion_tokens']:,}",
            f"{of['seconds'] / of['requests']:.2f}",
        )
        for stage, of in spent.items()
    ]
    text = format_table(("stage", "answers", "prompt tokens", "completion tokens", "seconds an answer"), rows)
    text += "\n\nEqual requests are asked once, and counted for each row that they serve."
    if seconds is None:
        return text
    return f"{text}\n\nFrom the first request to the last answer: {duration(seconds)}, breaks included."


def code_block(text: str) -> str:
    """As a code block: models write Markdown, HTML and tags of their own."""
    fence = "`" * max(3, 1 + _longest_run(text, "`"))
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str, character: str) -> int:
    longest = run = 0
    for one in text:
        run = run + 1 if one == character else 0
        longest = max(longest, run)
    return longest


def truncate_middle(text: str, most: int) -> str:
    """`text` in at most so many characters, on one line: its middle is left out."""
    text = " ".join(text.split())
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def replace_section(report: Path, heading: str, text: str) -> None:
    """Put `text`, which begins with the line `heading` ("## ..."), in the place of the section that did, or last."""
    old = report.read_text(encoding="utf-8") if report.is_file() else ""
    before, found, rest = f"\n{old}".partition(f"\n{heading}\n")
    behind = re.search(r"^## ", rest, re.MULTILINE) if found else None
    parts = [before.strip("\n"), text.strip("\n"), rest[behind.start() :].strip("\n") if behind else ""]
    with atomic_write(report) as [aside]:
        write_text(aside, "\n\n".join(part for part in parts if part) + "\n")
