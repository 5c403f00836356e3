"""Mentions of marks (tags of reasoning, control tokens) in prose, as opposed to marks that a model set.

An answer about language models names them: "it ends with </think>", "the token <|im_end|> closes a turn". A mark that
a model set is glued to the text, follows the end of a sentence, or is on a line of its own.
"""

import re

SENTENCE_END = ".!?…。！？"
_NOUNS = (
    r"(?:tags?|tokens?|mark(?:er)?s?|closers?|openers?|delimiters?|symbols?|strings?|sequences?|formats?|forms?"
    r"|templates?|syntax|examples?)"
)
_NAMED_BEFORE = re.compile(
    rf"(?:^|\W)(?:{_NOUNS}|is|are|was|were|be|with|as|by|the|an?|and|or|to|of|in|from|until|after|before|like|than"
    r"|its?|which|us(?:e[sd]?|ing)|called|named|writ(?:es?|ten)|add(?:s|ed)?|emits?|wrote|has|have|reserves?|see)"
    r"[ \t]+[\"'“‘«(*_]*\Z",
    re.IGNORECASE,
)
_NAMED_AFTER = re.compile(
    r"[\"'”’»)*_]*(?:[,;:](?=\s|\Z)|[ \t]+(?:is|are|was|were|and|or|then|tags?|tokens?|mark(?:er)?s?|opens?|closes?"
    r"|begins?|starts?|ends?|means?|does|do|in|at|as|for|to|has|have|stands?|comes?|tells?|before|after)\b)"
)
_NOUN_AT_END = re.compile(rf"\b{_NOUNS}\b[^.!?…。！？\n]*\Z", re.IGNORECASE)
_LIST_MARKER = re.compile(r"(?:^|\n)[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\Z")
_WORD = 24
"""Characters before a mark that hold the word before it, with a quotation mark."""
_SHORT = 120
"""Characters before a mark that are searched for its sentence."""


def is_named(text: str, start: int, end: int) -> bool:
    """Return True if the words around a mark name it: "the tag </think>", "<think> is"."""
    return bool(_NAMED_AFTER.match(text, end) or _NAMED_BEFORE.search(text[max(0, start - _WORD) : start]))


def is_named_before(text: str, start: int) -> bool:
    """Return True if the word before a mark names it, on its line or on the one before."""
    return _NAMED_BEFORE.search(f"{text[max(0, start - _WORD) : start].rstrip()} ") is not None


def is_named_after(text: str, end: int) -> bool:
    """Return True if the words after a mark name it."""
    return _NAMED_AFTER.match(text, end) is not None


def is_announced(text: str, start: int) -> bool:
    """Return True if a colon or a list marker precedes a mark: the text shows it."""
    before = text[max(0, start - _SHORT) : start]
    return before.rstrip().endswith((":", "：")) or _LIST_MARKER.search(before) is not None


def speaks_of_marks(text: str) -> bool:
    """Return True if the last, unfinished sentence of a text names a tag, a token or a format."""
    return _NOUN_AT_END.search(text[-_SHORT:].rstrip().rstrip(":")) is not None


def is_word(text: str, start: int, end: int) -> bool:
    """Return True if a mark is a word of its sentence: after a space and a word, a quote or a bracket."""
    if text[end : end + 1] in tuple(",;:)\"'”’»"):
        return True
    before = text[max(0, start - 3) : start]
    words = before.rstrip(" \t")
    if words == before:
        return bool(before) and not (before[-1].isalnum() or before[-1] in f"{SENTENCE_END})*_\n>]}}\"”’'`")
    return words[-1:] not in tuple(f"{SENTENCE_END}>]\n")
