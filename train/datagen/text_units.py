"""Units of text: words in any script, n-grams, sentences, paragraphs, list items."""

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


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents and punctuation.

    Parts joined by a hyphen or an apostrophe are one word, and so is a number with its separators. In scripts without
    blanks, each character is a word.
    """
    plain = unicodedata.normalize("NFC", text).casefold().translate(_combining_marks()).replace("’", "'")
    return _WORD.findall(plain)


def extract_ngrams(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Return all runs of `length` consecutive words."""
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@functools.cache
def _combining_marks() -> dict[int, None]:
    """Return a translation table that removes vowel signs and accents; in `_WORD` each would end a word."""
    blocks = itertools.chain(range(0x20000), range(0xE0100, 0xE01F0))  # there are none elsewhere
    return {code: None for code in blocks if unicodedata.category(chr(code)).startswith("M")}


def has_paragraphs(text: str, count: int) -> bool:
    """Return whether blank lines divide a text into `count` paragraphs of prose; headings, lists and code are none."""
    parts = [part for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
    return len(parts) == count and not any(map(_NO_PARAGRAPH.match, parts))


def count_sentences(text: str) -> int:
    """Count sentences: at least one per non-empty line; a full stop ends one except after common abbreviations."""
    lines = [re.sub(r"^[^\S\n]*(?:\d+[.)]|[-*•+#]+)[^\S\n]+", "", line).strip() for line in text.splitlines()]
    pieces = (piece for line in lines for piece in _SENTENCE_END.split(_ABBREVIATIONS.sub(r"\1", line)))
    return sum(any(map(str.isalnum, piece)) for piece in pieces)


def is_json_object(text: str) -> bool:
    """Return whether a text is one JSON object and nothing else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False
