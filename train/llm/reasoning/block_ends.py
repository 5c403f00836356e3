"""Ends of reasoning: the closer of an opener, a closer without one, and blocks further on in a text.

A closer may also be a word of the reasoning or of the answer. It certainly ends reasoning if it is glued to the text
before it, follows the end of a sentence, or is on a line of its own which no text announces.
"""

import re

from train.llm.reasoning.code_spans import blank_code
from train.llm.reasoning.forms import BLOCK, Form, lone_closers
from train.llm.reasoning.mentions import (
    SENTENCE_END,
    is_announced,
    is_named,
    is_named_after,
    is_named_before,
    speaks_of_marks,
)

_QUOTES = "\"'“”‘’«»("
_SENTENCE_END = '.!?…。！？:)]}>*"”’'


def find_closer(text: str, opener: re.Match[str], form: Form, *, must_be_clear: bool) -> tuple[int, int] | None:
    """Return the span of the closer of an opener; None if it has none.

    `must_be_clear`: the text may speak of the opener, so a closer that it may speak of doesn't count.
    """
    plain = blank_code(text)
    closers = form.closers(plain, opener)
    if not closers and not form.needs_closer:  # a lone backtick in the reasoning, or all of it in a code block
        closers = form.closers(text, opener)
    clear = (closer for closer in closers if form.alone != "word" or _ends_reasoning(text, *closer.span()))
    closer = next(clear, None if must_be_clear or not closers else closers[0])
    if closer is None:
        return None if form.needs_closer else _shift(find_lone_closer(text[opener.end() :]), opener.end())
    end = closer.end()
    if form.alone and _is_paired(plain, form, closer, opener.end()):  # reasoning that holds a block itself
        return _shift(find_lone_closer(text[end:]), end) or closer.span()
    return closer.span()


def find_lone_closer(text: str) -> tuple[int, int] | None:
    """Return the span of a closer without an opener; None if nothing certainly ends reasoning."""
    plain = blank_code(text)
    last: dict[str, int] = {}
    for form, closer in lone_closers(plain):
        start, end = closer.span()
        is_paired = _is_paired(plain, form, closer, last.get(closer[0], 0))
        last[closer[0]] = end
        if is_paired:
            continue
        match form.alone:
            case "word":
                ends = _ends_reasoning(text, start, end)
            case "glued":
                before, after = text[:start], text[end:]
                ends = not (before[-1:].isspace() or after[:1].isspace()) and bool(before and after)
            case _:
                ends = not is_named(text, start, end)
        if ends:
            return start, end
    return None


def strip_blocks(text: str) -> tuple[str, list[str], bool]:
    """Return the text without reasoning on lines of its own, this reasoning, and True if some of it has no end."""
    kept: list[str] = []
    thoughts: list[str] = []
    at = 0
    plain = blank_code(text) if BLOCK.search(text) else ""
    for opener in BLOCK.finditer(plain):
        start, begin = opener.span()
        before = text[at:start].rstrip() or "".join(kept).rstrip()
        if start < at or not before or is_named_after(text, begin) or is_announced(text, start):
            continue
        if speaks_of_marks(before):
            continue
        name = re.escape(opener["name"] or opener["mark"])
        mark = re.compile(rf"</\s*{name}\s*>" if opener["name"] else rf"\[/{name}\]", re.IGNORECASE)
        closers = mark.finditer(plain, begin)
        end = next((closer.span() for closer in closers if _ends_reasoning(text, *closer.span())), None)
        if end:
            kept.append(text[at:start])
            thoughts.append(text[begin : end[0]].strip())
            at = len(text) - len(text[end[1] :].lstrip())
        elif not mark.search(plain, begin):
            return text, thoughts, True
    answer = "".join([*kept, text[at:]])
    return (answer.rstrip() if thoughts else text), thoughts, False


def _is_paired(text: str, form: Form, closer: re.Match[str], start: int) -> bool:
    """Return True if a closer belongs to an opener after `start`. One that reasoning speaks of opens nothing."""
    for opener in form.openers(text, closer, start):
        line = text.rfind("\n", 0, opener.start()) + 1
        following = text[opener.end() : opener.end() + 1]
        is_mentioned = text[line : opener.start()].strip() and following in tuple(" \t.,;:!?)\"'”’»")
        if not is_mentioned:
            return True
        is_on_its_line = text.find("\n", opener.end(), closer.start()) < 0
        is_glued = text[closer.start() - 1] in _SENTENCE_END and not text[closer.end() : closer.end() + 1].isspace()
        if is_on_its_line and not is_glued:
            return True
    return False


def _ends_reasoning(text: str, start: int, end: int) -> bool:
    """Return True if a tag ends reasoning. In prose about the tag, it is a separate word."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    is_glued = len(before) == start
    if is_glued and before[-1:] in tuple(SENTENCE_END):
        return True
    if is_named_after(text, end):
        return False
    if not before:
        return True
    is_after_sentence = before[-1] in _SENTENCE_END
    if not after:
        return is_glued or is_after_sentence
    begins_line = "\n" in text[len(before) : start]
    gap = text[end : len(text) - len(after)]
    if begins_line and "\n" in gap:
        return not speaks_of_marks(before) and (
            is_after_sentence or "\n\n" in gap or not after[0].islower() or not is_named_before(text, start)
        )
    if not is_glued and is_named(text, start, end):
        return False
    if "\n" in gap:
        return True
    if not gap and (after[0] in ",;:.?!)" or (before[-1] in _QUOTES and is_glued and after[0] in _QUOTES)):
        return False
    if is_glued or after[0].isupper():
        return True
    return not after[0].islower() and (is_after_sentence or begins_line or not gap)


def _shift(span: tuple[int, int] | None, by: int) -> tuple[int, int] | None:
    return (span[0] + by, span[1] + by) if span else None
