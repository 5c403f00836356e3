"""Text for a terminal: lines wrapped at words, long texts shortened in their middle, control characters made visible.

Widths are in columns: a Chinese, Japanese or Korean character takes two.
"""

import re
import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len, split_graphemes

HANGING = 2
"""Columns by which a continuation line is indented below the line that it continues."""
_LEAST_WIDTH = 40
_LOOK_BACK = 40
"""Characters in which a place between two words is looked for, where a text is cut."""
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "␦")
# Directional marks reorder the letters around them, so that a row could read otherwise than it is (CVE-2021-42574).
_PICTURES |= {
    code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def visible(text: str) -> str:
    """Return `text` with its control characters, except line breaks and tabs, as pictures or escapes.

    A row must not drive the terminal.
    """
    return text.translate(_PICTURES)


def wrap(text: str, width: int, indent: int = 0, hanging: int = HANGING) -> str:
    """Return `text` in lines of at most `width` columns, broken between words.

    The first line is taken to stand behind `indent` columns that are already written; each continuation line begins
    with `indent + hanging` blanks. A word that is wider than a line (a path) is kept whole, so that it can be copied;
    one that holds wide characters is broken between characters, as those languages put no blanks between words.
    """
    room = max(width, _LEAST_WIDTH) - indent - hanging
    lines: list[str] = []
    left = room + hanging
    for line in text.split("\n"):
        current = ""
        for blanks, part in _parts(line, room):
            needed = cell_len(part)
            if current and len(blanks) + needed > left:
                lines.append(current)
                current, left, blanks = "", room, ""
            current += blanks + part
            left -= len(blanks) + needed
        lines.append(current)
        left = room
    return f"\n{' ' * (indent + hanging)}".join(lines)


def _parts(line: str, room: int) -> Iterator[tuple[str, str]]:
    """Yield the parts of a line between which it may be broken, each with the blanks before it."""
    for blanks, word in re.findall(r"( *)([^ ]+)", line):
        for part in _breakable(word) if cell_len(word) > room else [word]:
            yield blanks, part
            blanks = ""


def _breakable(word: str) -> list[str]:
    """Return the parts between which a long word may be broken: at wide characters, but not before a full stop."""
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
    """Return `text` in about `room` characters: its middle is left out, with a note of how much that is.

    The ends stay, where training begins or stops; `tail` characters of them at the end, half without it. A cut falls
    between two words if there is a blank near, and never within a character and its combining marks.
    """
    if len(text) - room < _LOOK_BACK:
        return text
    tail = room // 2 if tail is None else tail
    start, end = (_cut(text, place) for place in (room - tail, len(text) - tail))
    return f"{text[:start]} [... {end - start:,} characters ...] {text[end:]}"


def _cut(text: str, place: int) -> int:
    """Return the last place up to `place` behind a blank; where none is near, one at which a character begins."""
    window = max(place - _LOOK_BACK, 0)
    blank = max(text.rfind(" ", window, place), text.rfind("\n", window, place))
    starts = [start for start, _, _ in split_graphemes(text[window : place + _LOOK_BACK])[0]]
    return blank + 1 if blank >= 0 else window + max(start for start in starts if window + start <= place)


def duration(seconds: float) -> str:
    """`seconds` as a person says it: 42s, 3m07s, 2h05m, 4d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"


def format_count(count: int, noun: str, one: str = "", many: str = "") -> str:
    """`1 row`, `2 rows`; with the form of a verb for one and for many, `1 row is`, `2 rows are`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural} {one if count == 1 else many}".rstrip()
