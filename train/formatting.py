"""Formatting of text for terminals and logs: wrapped lines, shortened texts, visible control characters, durations.

Widths are in columns: a Chinese, Japanese or Korean character takes two.
"""

import re
import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len, split_graphemes

HANGING = 2
"""Columns by which continuation lines are indented."""
_MIN_WIDTH = 40
_LOOK_BACK = 40
"""Characters before a cut that are searched for a blank."""
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "␦")
# Directional marks reorder the letters around them and can disguise a text (CVE-2021-42574).
_PICTURES |= {
    code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def visible(text: str) -> str:
    """Replace control characters, except line breaks and tabs, with symbols or escapes.

    Text of a row must not control the terminal.
    """
    return text.translate(_PICTURES)


def wrap(text: str, width: int, indent: int = 0, hanging: int = HANGING) -> str:
    """Wrap `text` at `width` columns, between words.

    The first line starts after `indent` columns that are already written; continuation lines start with
    `indent + hanging` blanks. Words wider than a line (paths) are not broken, so that they can be copied; words with
    wide characters are broken between characters, because those languages have no blanks between words.
    """
    room = max(width, _MIN_WIDTH) - indent - hanging
    lines: list[str] = []
    remaining = room + hanging
    for line in text.split("\n"):
        current = ""
        for blanks, part in _parts(line, room):
            needed = cell_len(part)
            if current and len(blanks) + needed > remaining:
                lines.append(current)
                current, remaining, blanks = "", room, ""
            current += blanks + part
            remaining -= len(blanks) + needed
        lines.append(current)
        remaining = room
    return f"\n{' ' * (indent + hanging)}".join(lines)


def _parts(line: str, room: int) -> Iterator[tuple[str, str]]:
    """Yield the unbreakable parts of a line, each with the blanks before it."""
    for blanks, word in re.findall(r"( *)([^ ]+)", line):
        for part in _breakable(word) if cell_len(word) > room else [word]:
            yield blanks, part
            blanks = ""


def _breakable(word: str) -> list[str]:
    """Return the parts of a long word: it may be broken at wide characters, but not before a full stop."""
    parts: list[str] = []
    wide_before = True
    for start, end, width in split_graphemes(word)[0]:
        wide = width > 1
        closes = unicodedata.category(word[start]) in ("Pe", "Pf", "Po")
        if parts and (closes or not (wide or wide_before)):
            parts[-1] += word[start:end]
        else:
            parts.append(word[start:end])
        wide_before = wide
    return parts


def shorten(text: str, room: int, tail: int | None = None) -> str:
    """Shorten `text` to about `room` characters by replacing its middle with the number of omitted characters.

    Start and end, where training starts and stops, are kept; `tail`: characters kept at the end (default half). Cuts
    are at a blank where there is one nearby, and never between a character and its combining marks.
    """
    if len(text) - room < _LOOK_BACK:
        return text
    tail = room // 2 if tail is None else tail
    start, end = (_cut(text, position) for position in (room - tail, len(text) - tail))
    return f"{text[:start]} [... {end - start:,} characters ...] {text[end:]}"


def _cut(text: str, position: int) -> int:
    """Return the last position up to `position` after a blank; without a blank nearby, the start of a character."""
    window = max(position - _LOOK_BACK, 0)
    blank = max(text.rfind(" ", window, position), text.rfind("\n", window, position))
    starts = [start for start, _, _ in split_graphemes(text[window : position + _LOOK_BACK])[0]]
    return blank + 1 if blank >= 0 else window + max(start for start in starts if window + start <= position)


def duration(seconds: float) -> str:
    """Return `seconds` as 42s, 3m07s, 2h05m or 4d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"


def format_count(count: int, noun: str, singular_verb: str = "", plural_verb: str = "") -> str:
    """Return `1 row`, `2 rows`; with verbs, `1 row is`, `2 rows are`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural} {singular_verb if count == 1 else plural_verb}".rstrip()
