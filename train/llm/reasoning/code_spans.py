"""Code in a text, in which marks of reasoning and control tokens are quoted and have no effect.

    ```, ~~~ (three or more)   to a fence of the same sign that is at least as long
    `x`, ``x``                 on one line
    four spaces or a tab       after an empty line or a colon
    <code>x</code>, <pre>      in HTML

Reasoning is often untidy: it leaves a fence open, and the closer of the reasoning then looks like code. A block
therefore ends at such a closer if the fences after it pair up.
"""

import re

from train.llm.reasoning.forms import CLOSER

_FENCE = re.compile(
    r"^[^\S\n]*(`{3,}|~{3,})[^\S\n]*([^`<\n]*)(?=<|$)|(?<![`\n])(`{3,})[^\S\n]*(\w*)[^\S\n]*$", re.MULTILINE
)
"""A fence on a line of its own, or at the end of another line. A tag or a token after it is no label."""
_INLINE = re.compile(
    r"(?<!`)`(?![`\s])(?:(?!\w[.!?]</)[^`\n])*+(?<!\s)`(?!`)|(?<!`)(`{2,5})(?!`)[^\n]{1,300}?(?<!`)\1(?!`)"
)
"""A sentence that ends before a closing tag is no code: the backtick before it is a typo."""
_INDENTED = re.compile(r"(?:(?<=\n\n)|(?<=:\n))(?:(?: {4}|\t)[^\n]*(?:\n+|\Z))+")
_HTML = re.compile(r"<(code|pre)\b[^<>]*>.*?</\1>", re.DOTALL)

_NO_END_OF_LINE = re.compile(r"[^\n]")


def blank_code(text: str) -> str:
    """Return `text` with its code replaced by spaces; line breaks and all other characters keep their positions."""
    if "\n    " in text or "\n\t" in text:
        text = _INDENTED.sub(_blank, text)
    if "`" in text or "~~~" in text:
        parts, end = [], 0
        for start, stop in _fenced(text):
            parts += [text[end:start], _NO_END_OF_LINE.sub(" ", text[start:stop])]
            end = stop
        text = _INLINE.sub(_blank, "".join([*parts, text[end:]]))
    if "</code>" in text or "</pre>" in text:
        text = _HTML.sub(_blank, text)
    return text


def _blank(code: re.Match[str]) -> str:
    return _NO_END_OF_LINE.sub(" ", code[0])


def _fenced(text: str) -> list[tuple[int, int]]:
    """Return the spans of the fenced blocks."""
    fences = list(_FENCE.finditer(text))
    ends = [_end_of_block(fences, at) for at in range(len(fences))]
    pairs_up = [True] * (len(fences) + 1)  # from each fence on
    for at in reversed(range(len(fences))):
        pairs_up[at] = ends[at][1] and pairs_up[ends[at][0] + 1]
    spans, at = [], 0
    while at < len(fences):
        start = fences[at].start()
        last, is_closed = ends[at]
        limit = fences[last].start() if last < len(fences) else len(text)
        closer = CLOSER.search(text, fences[at].end(), limit)
        following = at + 1
        while closer and following < len(fences) and fences[following].start() < closer.end():
            following += 1
        if closer and (not is_closed or pairs_up[following]):
            spans.append((start, closer.start()))
            at = following
        elif is_closed:
            spans.append((start, fences[last].end()))
            at = last + 1
        else:
            spans.append((start, limit))
            at = last
    return spans


def _end_of_block(fences: list[re.Match[str]], at: int) -> tuple[int, bool]:
    """Return the index of the fence that ends a block, and True if it closes it: a labelled one opens another."""
    sign = fences[at][1] or fences[at][3]
    for number in range(at + 1, len(fences)):
        other = fences[number][1] or fences[number][3]
        if other[0] == sign[0] and len(other) >= len(sign):
            return number, not (fences[number][2] or fences[number][4])
    return len(fences), False
