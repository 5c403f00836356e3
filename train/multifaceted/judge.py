"""Parser of the judge's score: the number 1 to 5 at the end of a free-text answer."""

import re
from collections.abc import Mapping
from typing import Any

from train.llm.json_replies import json_at_end

_TAG = re.compile(r"[\[【［]\s{0,3}result\s{0,3}\\?[\]】］]+", re.IGNORECASE | re.ASCII)
_OPENING = r"(?:[\s:：=*_`~\"'“‘(\[{<$]|\\boxed|\\text)*+"
_CLOSING = r"[*_`~\"'”’)\]}>$]*+"
_NUMBER_WORD = r"(?:one|two|three|four|five|six|seven|eight|nine|ten)\b"
_DIGIT = r"(?P<score>[1-5])(?:[.,]0{1,2})?(?![^\W_])"
_OUT_OF_FIVE = rf"(?:[^\S\n]*(?:[/⁄]|out[^\S\n]+of)[^\S\n]*{_OPENING}(?:5(?:\.0)?|five)(?![^\W_]){_CLOSING})?+"
_CONTINUES = rf"[^\S\n]*(?:[+%]|(?:[^\w\s]{{1,3}}|to\b|or\b|and\b|out[^\S\n]+of\b)?[^\S\n]*[(\[]?(?:\d|{_NUMBER_WORD}))"
_NAME = r"(?:(?:the|my|final|overall)\s+)*(?:score|result|rating|grade)\s*(?:of\b|is\b|[:=])?"
_AFTER_TAG = re.compile(
    rf"{_OPENING}(?:[-–—]\s+|(?:[-=]>|→)\s*)?(?:{_NAME}{_OPENING})?(?:n\b{_OPENING})?{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}(?!{_CONTINUES})",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(
    rf"(?<![\w\]])\[\s*(?:score\s*(?:of\b|[:=])?\s*)?{_DIGIT}\s*{_OUT_OF_FIVE}\]{{0,2}}[\s.!*_]*\Z", re.I
)
_IN_WORDS = r"(?:[^\S\n]*\([a-z][a-z ,'’-]{0,80}\))?"
"""The score as a word after the number, as in `4 (good)`."""
_LAST_WORDS = re.compile(
    rf"\bscore\s*(?:of\b|is\b|[:=])?{_OPENING}{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}(?P<more>{_IN_WORDS}[\s.!*_]*)\Z",
    re.IGNORECASE,
)
_ON_ITS_OWN_LINE = re.compile(
    rf"(?:\{{.*)?[^\w\n]*+(?:{_NAME}{_OPENING}[\]}}>]*+(?:[-–—]\s+)?|(?<=\\)boxed){_OPENING}"
    rf"{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}(?P<more>{_IN_WORDS})[^\w+%]*(?:(?:result|score|rating|grade)>)?",
    re.IGNORECASE,
)
_HEADING = re.compile(
    rf"(?:\A|\n)[^\S\n]*(?:#{{1,6}}[^\S\n]*[*_]*|[*_]{{2,}}){_NAME}[:*_]*\s*\n\s*{_OPENING}{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}"
    r"[^\w+%]*\Z",
    re.IGNORECASE,
)
"""A heading (`### Result`, `**Score**`) with the number alone below it."""
_NOT_A_VERDICT = re.compile(
    r"\b(?:no|not|never|without|would|could|should|might|from|below|above|under|over|than|between|short|if|unless"
    r"|fail\w*|almost|nearly|hardly|barely|max(?:imum)?|min(?:imum)?|highest|lowest|possible|other|another|previous"
    r"|reference|to (?:earn|get|reach|merit|deserve|achieve|receive|obtain|have))\b|n['’]t\b|['’]d\b|\bhad\b",
    re.IGNORECASE,
)
_I_WOULD_GIVE = re.compile(
    r"\A\W*(?:(?:so|thus|therefore|hence|overall|accordingly|on balance|in (?:summary|conclusion)|all in all"
    r"|for (?:this|these) reasons?|given (?:this|that|all (?:this|that))|based on (?:this|that))\W+)*"
    r"I(?: would|['’]d)(?=(?: therefore| thus)? (?:give|assign|rate|award|grade|score)\b)",
    re.IGNORECASE,
)
"""The beginning of a sentence whose `would` is polite, not conditional."""
_OTHER_NUMBER = r"(?:0|[6-9]|[1-9]\d+|six|seven|eight|nine|ten|twenty|(?:a )?hundred)\b"
_IN_DOUBT = re.compile(
    r"\W{0,3}(?:(?:and|plus|with|&)\W{1,2})?(?:an?\W|one\W)?(?:half|quarter)\b|\W{0,3}(?:plus|minus|per ?cent)\b"
    r"|\W{0,3}point (?:\d|five)"
    r"|(?:(?!\b(?:because|since|as)\b)[^.;\n])*?"
    r"(?:\b(?:out of|of|from|over|up to)\W{1,3}(?:a |possible |total |of |maximum )*"
    rf"{_OTHER_NUMBER}|\bscale\b[^.;\n]{{0,25}}?\b{_OTHER_NUMBER}|\b{_OTHER_NUMBER}\W?(?:point|star|grade)"
    r"|\b(?:or|maybe|perhaps|possibly|rather|almost|nearly|close to|leaning(?: to| towards?)?)\W{1,3}"
    r"(?:(?:maybe|perhaps|possibly|even|an?|to)\W{1,2}){0,2}(?:\d|two\b|three\b|four\b|five\b))",
    re.IGNORECASE,
)
"""Phrases after a number that revoke it: another scale, a fraction, a second number."""
_ENDING_TAG = re.compile(r"[\s*_(]*(?P<score>[1-5])(?:\s*/\s*5)?[\s*_).]*")
_JSON_NAMES = frozenset(("score", "result", "rating", "grade", "finalscore", "overallscore", "finalresult"))
_WINDOW = 300
"""Number of characters after the tag, or before the end, that are searched for the score."""


def parse_score(text: str) -> int | None:
    """Return the score at the end of a judge's answer, 1 to 5, or None if there is no clear one. Never raises.

    The last `[RESULT]`, in upper or lower case, decides alone. The number must follow it, perhaps in marks (`**4**`,
    `(5)`), after a colon or a name (`Score:`, `score of`, `n =`), and before `/5` or `out of 5`. Longer numbers and
    ranges are no scores: 10, 4.5, 4-5, "4 or 5", 4/10, "5 (out of 10)", "4 and a half", 4+. An earlier `[RESULT]` may
    be a quotation from the graded answer and does not count, unless the last one only closes it
    (`[RESULT] 4 [RESULT]`). Digits are ASCII. Text after the score is skipped. Brackets may be escaped (`\\[`) or
    Chinese (`【RESULT】`).

    Without any `[RESULT]` the text must end in

    - a JSON object with one score, wherever its key stands (`{"score": 4, "reason": "..."}`),
    - `[3]`, `[[3]]`, `[Score 4]`, `(Score 5)`, `score: 3` or `score of 1`, the last two not in a negative
      sentence ("keeps it from a score of 5") or one about the reference answer,
    - a last line that holds only the score under a name (`**Result: 4**`, `[RESULT: 4]`, `Grade: 4/5`,
      `<score>4</score>`) or in a box (`\\boxed{4}`), or the number below a heading (`### Result`). Within a sentence
      these may be quotations from the answer.
    """
    tags = list(_TAG.finditer(text))
    if tags:
        after = text[tags[-1].end() :][:_WINDOW]
        if len(tags) > 1 and not after.strip(" \n\t*_."):
            match = _ENDING_TAG.fullmatch(text, tags[-2].end(), tags[-1].start())
            return int(match["score"]) if match else None
        match = _AFTER_TAG.match(after)
        return int(match["score"]) if match and not _IN_DOUBT.match(after, match.end()) else None
    end = text.rstrip()[-_WINDOW:]
    if (record := json_at_end(text)) is not None:
        return _score_in(record)
    if match := _IN_BRACKETS.search(end):
        return int(match["score"]) if "]" in match[0] and "reference" not in _sentence_before(end, match) else None
    if match := _LAST_WORDS.search(end):
        sentence = _I_WOULD_GIVE.sub("I", _sentence_before(end, match), count=1)
        is_no_verdict = _NOT_A_VERDICT.search(sentence) or _IN_DOUBT.match(match["more"])
        return None if is_no_verdict else int(match["score"])
    if match := _HEADING.search(end):
        return int(match["score"])
    last_line = end.rstrip(" \n$`*\\]}").rpartition("\n")[2]
    match = _ON_ITS_OWN_LINE.fullmatch(last_line)
    return int(match["score"]) if match and not _IN_DOUBT.match(match["more"]) else None


def _sentence_before(text: str, match: re.Match[str]) -> str:
    """Return the sentence before a match, or the heading above a line that has nothing else."""
    sentence = re.split(r"[.!?\n]", text[: match.start()])[-1]
    if sentence.strip(" *_#-"):
        return sentence.lower()
    above = text[: match.start()].rstrip(" \n*_#-").rpartition("\n")[2]
    return above.lower() if above.startswith(("#", "*")) or above.endswith(":") else ""


def _score_in(record: Mapping[str, Any]) -> int | None:
    """Return the only score of a JSON object; None if there is none, or if its scale is not 1 to 5."""
    names = {name: re.sub(r"[\W_]", "", name).lower() for name in record}
    scores = [record[name] for name, plain in names.items() if plain in _JSON_NAMES]
    scales = [record[name] for name, plain in names.items() if re.search(r"max|scale|outof|possible", plain)]
    if len(scores) != 1 or isinstance(scores[0], bool):
        return None
    if any(not re.fullmatch(r"(?:1\W*(?:to)?\W*)?5(?:\.0)?", str(scale)) for scale in scales):
        return None
    match = re.fullmatch(rf"\s*{_DIGIT}{_OUT_OF_FIVE}\s*", str(scores[0]))
    return int(match["score"]) if match else None
