"""Verdicts that stand on another line than their tag, or behind a phrase without quotes, as lines of `tag: verdict`.

    ### Role     - **Role**:            <<Role>>You are a nurse.<</Role>>    Good:     Role: You are a nurse. - Good
    Good           - Verdict: Good      Good                                 - Role

The rules for what counts as a verdict in one line are those of `verdicts.py`, which reads these lines.
"""

import re
from collections.abc import Iterator

from train.sysgen.tag_names import TAGS

_TAG = rf"(?P<tag>{'|'.join(TAGS)})s?\b"
_WORD = r"(?P<verdict>good|bad|none)\b"
_BEFORE = r"[^\w\n]{0,20}(?:(?:\d{1,2}|[a-h])[.)][^\w\n]{1,20})?"
_REASON = r"(?:\W*$|[^\w\n]*[,;.:(–—-][^\n]*$|\W+(?:because|as(?! long)|since|due to|in that|but|though|although)\b)"

_ABOUT_A_TAG = re.compile(rf"{_BEFORE}(?:(?:the|tag)\b[^\w\n]{{0,9}})*{_TAG}(?P<rest>[^\n]*)$", re.IGNORECASE)
_LABELLED = re.compile(
    rf"{_BEFORE}(?:the )?(?:final )?(?:verdict|judge?ment|assessment|rating|evaluation)\b\W{{0,12}}(?:is\W{{1,4}})?"
    rf"{_WORD}{_REASON}",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"(?![ ]*#)[^\w\n]{{0,20}}{_WORD}(?![*_ ]*:){_REASON}", re.IGNORECASE)
_HEADING = re.compile(rf"(?P<marks>[^\w\n]{{0,20}}){_WORD}(?P<colon>[*_ ]*:)?[^\w\n]*$", re.IGNORECASE)
_BEHIND = re.compile(
    rf"[*_ ]*:[*_ ]*(?P<phrase>\S[^\n]{{0,400}}?) *(?:[–—→>-]+|[(\[])[*_ ]*{_WORD}[)\].*_ ]*$", re.IGNORECASE
)
_ANY_WORD = re.compile(r"\b(?:good|bad|none|not)\b|n['’]t\b", re.IGNORECASE)


def verdict_lines(text: str) -> Iterator[str]:
    """Yield a line for each verdict of such a form. A tag takes a verdict only from the lines before the next tag."""
    tag = listed = ""
    is_open = False
    for line in filter(str.strip, text.splitlines()):
        heading = _HEADING.match(line)
        if heading and (heading["colon"] or "#" in heading["marks"]):
            tag, listed = "", heading["verdict"]
        elif about := _ABOUT_A_TAG.match(line):
            rest = about["rest"]
            is_bare = not re.search(r"\w", rest)
            if listed and is_bare:
                yield f"{about['tag']}: {listed}"
                tag = ""
                continue
            listed = ""
            if behind := _BEHIND.match(rest):
                if not _ANY_WORD.search(behind["phrase"]):
                    yield f"{about['tag']}: {behind['verdict']}"
                tag = ""
                continue
            tag = "" if re.match(r"\W*(?:good|bad|none)\b", rest, re.IGNORECASE) else about["tag"]
            is_open = is_bare or bool(re.search(rf"<< ?[/\\]+ ?{about['tag']}s? ?>>\W*$", rest, re.IGNORECASE))
        else:
            listed = ""
            if tag and (found := _LABELLED.match(line) or (_ALONE.match(line) if is_open else None)):
                yield f"{tag}: {found['verdict']}"
                is_open = False
