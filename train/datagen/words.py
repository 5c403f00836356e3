"""What texts are made of, for gates, constraints and filters: words in any script, sentences, paragraphs, points."""

import functools
import itertools
import json
import re
import unicodedata

from train.data.sources.unread_text import WIDE

_LETTER = rf"[^\W_{WIDE}]"
_WORD = re.compile(rf"[{WIDE}]|{_LETTER}+(?:(?:['-]|[.,](?=\d)){_LETTER}+)*")
BULLET = re.compile(r"^[^\S\n]*[-*•+][^\S\n]+\S", re.MULTILINE)
NUMBERED = re.compile(r"^[^\S\n]*(\d{1,9})[.)][^\S\n]+\S", re.MULTILINE)
BOLD = re.compile(r"\*\*(?=[^\s*])[^*\n]*[^\s*]\*\*")
HEADING = re.compile(r"#{1,6}[^\S\n]+[^\s#]")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s)|[。！？]+")
_ABBREVIATIONS = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|e\.g|i\.e)\.(?=\s)")
_NO_PARAGRAPH = re.compile(r"\s*(?:(?:#{1,6}|[-*•+]|\d+[.)])(?:\s|$)|[-*_]{3,}\s|```|\||[\W_]*$)")


def words_of(text: str) -> list[str]:
    """Its words, without upper case and marks. What a hyphen or an apostrophe joins is one word, and so is a number
    with its digits; in a script without blanks, each character is one."""
    plain = unicodedata.normalize("NFC", text).casefold().translate(_marks()).replace("’", "'")
    return _WORD.findall(plain)


def runs_of(words: list[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@functools.cache
def _marks() -> dict[int, None]:
    """Vowel signs and accents that are characters of their own: a regular expression ends a word at each of them."""
    blocks = itertools.chain(range(0x20000), range(0xE0100, 0xE01F0))  # there are none elsewhere
    return {code: None for code in blocks if unicodedata.category(chr(code)).startswith("M")}


def has_paragraphs(text: str, wanted: int) -> bool:
    """Whether blank lines part it into so many paragraphs. Headings, lists, tables and code are none."""
    parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    return len(parts) == wanted and not any(map(_NO_PARAGRAPH.match, parts))


def count_sentences(text: str) -> int:
    """A line that isn't empty holds at least one. "Dr. Noether" is in one sentence; any other full stop ends it."""
    lines = [re.sub(r"^[^\S\n]*(?:\d+[.)]|[-*•+#]+)[^\S\n]+", "", line).strip() for line in text.splitlines()]
    pieces = (piece for line in lines for piece in _SENTENCE_END.split(_ABBREVIATIONS.sub(r"\1", line)))
    return sum(any(map(str.isalnum, piece)) for piece in pieces)


def is_json_object(text: str) -> bool:
    """Whether it is one JSON object and nothing else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False
