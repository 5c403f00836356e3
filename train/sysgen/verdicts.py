"""Verdicts on tags (Good, Bad, None), in the forms in which models write them.

    <<Role>>: Good        1. Role: Good        **Role** - Good because it names a profession.
    | Role | Good |       Role = Good          {"Role": "Good"}        {"tag": "Role", "verdict": "Good"}

A verdict is read where a line, a table row or a JSON object pairs a tag with one of the three words, in any case and
emphasis. The tag's phrase (in quotes, brackets or a table cell) and the words "verdict" or "is" may stand between the
two, and a reason behind the verdict. A line, a JSON list or a heading that names a verdict and then only tags is read
as well. So is a verdict on another line than its tag, or behind a phrase without quotes:

    ### Role     - **Role**:            <<Role>>You are a nurse.<</Role>>    Good:     Role: You are a nurse. - Good
    Good           - Verdict: Good      Good                                 - Role

Everything else is unread, such as several verdicts at once, or a condition.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal, get_args

from train.sysgen.tag_names import NAMES, TAGS, DroppedText

Verdict = Literal["Good", "Bad", "None"]


@dataclass(frozen=True)
class Verdicts:
    """The verdict on each tag. A tag without a readable verdict, or with two, is missing."""

    of: Mapping[str, Verdict]
    repairs: Mapping[str, int] = field(default_factory=dict, compare=False)
    dropped: tuple[DroppedText, ...] = field(default=(), compare=False)


PLACEHOLDER_VERDICTS: dict[str, Verdict] = dict(zip(TAGS, cycle(get_args(Verdict)), strict=False))
"""The verdicts in the form that the prompt shows; a reply that repeats them judges nothing."""

_VERDICTS: dict[str, Verdict] = {verdict.casefold(): verdict for verdict in get_args(Verdict)}

# Verdicts beside their tag

_NAME = rf"(?:{'|'.join(TAGS)})s?\b"
_WORD = rf"(?:{'|'.join(_VERDICTS)})\b"
_ANY_MARKS = r"[^\w\n]{0,20}"
_MARKS = r"[^\w\n,;.{]{0,20}"
_EMPHASIS = r"[ *_`\"'<>]{0,8}"

_ENTRY = re.compile(
    rf"""
    (?: <<\ ?[/\\]*\ ?(?P<tag>[^\W\d_]\w*)\ ?[/\\]*\ ?>> [^\w\n<]{{0,20}} (?:<<\ ?)?          # <<Task>>:
      | (?:^|[.,;|/{{(\[<>]) {_ANY_MARKS} (?:(?:\d{{1,2}}|[a-h])[^\w\n]{{1,20}})?              # 1.
        (?:(?:the|tag)\b{_MARKS})* (?P<bare>{_NAME}) (?:{_MARKS}\btag\b)?                     # the **Task** tag
        (?P<between>
          {_MARKS}
          (?: (?: "[^"\n]{{0,300}}" | “[^”\n]{{0,300}}” | \([^()\n]{{0,300}}\) | (?<=\|)[^|\n]{{0,300}}(?=\|) )
              {_MARKS} )??                                                                    # "Be brief." -
          (?: [,;]?{_ANY_MARKS} (?:the\ )?(?:verdict|judge?ment|assessment|rating)\b {_MARKS} )?
          (?: is\b(?:\ (?:judged|rated)\b)? {_MARKS} )?
        )
    )
    (?P<verdict>{_WORD}) (?!-\w)
    (?P<choice> {_EMPHASIS} (?: [/|&] | \bor\b | \band\b | ,(?={_EMPHASIS}{_WORD}(?!\ (?!or\b|and\b)\w)) )
        {_EMPHASIS}{_WORD} )?+                                                                # Good or Bad
    (?= \ ?(?: $ | [^\w\s] | (?:match|fit)\b(?!\ for\b)
              | (?:because|as(?!\ long)|since|due\ to|in\ that|but|though|although)\b ))
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)

_BY_VERDICT = re.compile(
    rf"^{_ANY_MARKS}(?P<verdict>{_WORD})[^\w\n]{{0,20}}[:=|>→–—-]{_ANY_MARKS}"
    rf"(?P<tags>{_NAME}(?:(?:[^\w\n]|\band\b){{1,20}}{_NAME})*){_ANY_MARKS}$",
    re.IGNORECASE | re.MULTILINE,
)
"""Good: Role, Task"""

_LINE_END = re.compile(r"[^\w\n]*$", re.MULTILINE)
_JSON = re.compile(r"[{\[]\s*[\"{\[]")


def parse_verdicts(text: str) -> Verdicts:
    """Return the verdicts in a reply. Never raises."""
    text = re.sub(r"[^\S\n]+", " ", html.unescape(text))
    lines = [text, *_json_lines(text), *_separate_lines(text)]
    verdicts: dict[str, set[Verdict]] = {}
    otherwise: set[str] = set()
    """Tags whose verdict is not in the prompt's form."""
    dropped: list[DroppedText] = []
    for match in (match for line in lines for match in _ENTRY.finditer(line)):
        written = match["tag"] or match["bare"]
        name = NAMES.get(written.casefold())
        if name is None:
            dropped.append(DroppedText(written, match[0].strip(), "none of the eight tags"))
        elif match["choice"]:
            dropped.append(DroppedText(name, match[0].strip(), "several verdicts at once"))
        elif match["between"] != " " or _LINE_END.match(match.string, match.end()):  # "Tool None" is a line of its own
            verdict = _VERDICTS[match["verdict"].casefold()]
            verdicts.setdefault(name, set()).add(verdict)
            if match[0] != f"<<{name}>>: {verdict}":
                otherwise.add(name)
    for match in (match for line in lines for match in _BY_VERDICT.finditer(line)):
        for written in re.findall(_NAME, match["tags"], re.IGNORECASE):
            name = NAMES[written.casefold()]
            verdicts.setdefault(name, set()).add(_VERDICTS[match["verdict"].casefold()])
            otherwise.add(name)
    of: dict[str, Verdict] = {}
    for name in TAGS:
        given = verdicts.get(name, set())
        if len(given) == 1:
            of[name] = next(iter(given))
        elif given:
            dropped.append(DroppedText(name, " and ".join(sorted(given)), "verdicts that contradict each other"))
    return Verdicts(of, {"written otherwise": len(otherwise)} if otherwise else {}, tuple(dropped))


def parse_reply_verdicts(text: str) -> Verdicts:
    """Return the verdicts in a reply to the prompt; none if it only repeats the prompt's own form."""
    verdicts = parse_verdicts(text)
    if verdicts.of == PLACEHOLDER_VERDICTS:
        return Verdicts({}, {}, (DroppedText("", text.strip(), "the placeholders of the prompt"),))
    return verdicts


# Verdicts in JSON


def _json_lines(text: str) -> Iterator[str]:
    """Yield the first JSON value of a text as lines of `tag: verdict`."""
    start = _JSON.search(text)
    if start is None:
        return
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start.start())
    except (ValueError, RecursionError):
        return
    unread: list[Any] = [value]
    while unread:
        value = unread.pop()
        if isinstance(value, list):
            unread += value
        elif isinstance(value, dict):
            for key, item in [*value.items(), (_find_only(value, NAMES), value)]:
                if verdict := _find_only(item, _VERDICTS):
                    yield f"{key}: {verdict}"
                if isinstance(item, list) and all(isinstance(text, str) for text in item):
                    yield f"{key}: {', '.join(item)}"
            unread += value.values()


def _find_only(value: Any, words: Mapping[str, Any]) -> str:
    """Return the only one of `words` among an object's values, or the text itself if it is one; else an empty text."""
    texts = value.values() if isinstance(value, dict) else [value]
    matches = [text for text in texts if isinstance(text, str) and text.strip("<> .").casefold() in words]
    return matches[0] if len(matches) == 1 else ""


# Verdicts on another line than their tag

_NAMED_TAG = rf"(?P<tag>{'|'.join(TAGS)})s?\b"
_NAMED_WORD = rf"(?P<verdict>{_WORD})"
_BEFORE = r"[^\w\n]{0,20}(?:(?:\d{1,2}|[a-h])[.)][^\w\n]{1,20})?"
_REASON = r"(?:\W*$|[^\w\n]*[,;.:(–—-][^\n]*$|\W+(?:because|as(?! long)|since|due to|in that|but|though|although)\b)"

_ABOUT_A_TAG = re.compile(rf"{_BEFORE}(?:(?:the|tag)\b[^\w\n]{{0,9}})*{_NAMED_TAG}(?P<rest>[^\n]*)$", re.IGNORECASE)
_LABELLED = re.compile(
    rf"{_BEFORE}(?:the )?(?:final )?(?:verdict|judge?ment|assessment|rating|evaluation)\b\W{{0,12}}(?:is\W{{1,4}})?"
    rf"{_NAMED_WORD}{_REASON}",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"(?![ ]*#)[^\w\n]{{0,20}}{_NAMED_WORD}(?![*_ ]*:){_REASON}", re.IGNORECASE)
_HEADING = re.compile(rf"(?P<marks>[^\w\n]{{0,20}}){_NAMED_WORD}(?P<colon>[*_ ]*:)?[^\w\n]*$", re.IGNORECASE)
_BEHIND = re.compile(
    rf"[*_ ]*:[*_ ]*(?P<phrase>\S[^\n]{{0,400}}?) *(?:[–—→>-]+|[(\[])[*_ ]*{_NAMED_WORD}[)\].*_ ]*$", re.IGNORECASE
)
_ANY_WORD = re.compile(r"\b(?:good|bad|none|not)\b|n['’]t\b", re.IGNORECASE)


def _separate_lines(text: str) -> Iterator[str]:
    """Yield such verdicts as lines of `tag: verdict`. A tag gets a verdict only from lines before the next tag."""
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
            if tag and (match := _LABELLED.match(line) or (_ALONE.match(line) if is_open else None)):
                yield f"{tag}: {match['verdict']}"
                is_open = False
