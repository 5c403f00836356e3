"""Verdicts of replies to yes-or-no questions.

A `yes` or `no` is a verdict if it opens its clause or follows only words that announce it ("so yes", "the answer is
no"), and a `no` only if no noun or adjective follows ("no jargon"). Contradicting verdicts count as none.
"""

import re

_CHOICE = re.compile(r"\b(?:yes|no)\b[\s()]*(?:[/|]|\bor\b|\band\b)[\s()]*(?:yes|no)\b(?!\s+\w)")
"""A repeated question, or no decision: yes/no, yes or no, yes and no."""

_MARKS = re.compile(r"[*_`\"“”„«»]|(?<!\w)['‘’]|['‘’](?!\w)")
"""Emphasis and quotation marks. They are removed: a quoted word of a sentence is no clause of its own."""

_CLAUSE_END = re.compile(r"[^\w\s'-]+|\n|-+(?!\w)|(?<!\w)-+")

_ANNOUNCE = (
    r"(?:so|thus|therefore|hence|then|but|overall|ultimately|absolutely|clearly|definitely|certainly|in|short|i(?:'d)?"
    r"|mostly|largely|generally|essentially|basically|would|think|believe|say|it(?:'s)?|this|that(?:'s)?|is|be|an?|the"
    r"|my|final|clear|correct|right|answer|response|reply|verdict|judge?ment|assessment|conclusion|decision|result)"
)
_AFTER_NO = (
    r"(?:i|it(?:'s)?|he|she|they|we|you|the|this|that|these|those|there|its|because|due to|as|since|but|and|not"
    r"|actually)\b"
)
_VERDICT = re.compile(rf"\s*(?:{_ANNOUNCE}\s+)*(yes(?![\w'-])(?!\s+would\s+(?!be\b))|no(?=\s*$|\s+{_AFTER_NO}))")


def says_no(reply: str) -> bool | None:
    """Return True if the verdict of a reply is no, False if yes; None without a verdict or with a contradiction."""
    text = _MARKS.sub("", reply.casefold()).replace("’", "'")
    clauses = _CLAUSE_END.split(_CHOICE.sub("\n", text))
    verdicts = {match[1] for clause in clauses if (match := _VERDICT.match(clause))}
    return "no" in verdicts if len(verdicts) == 1 else None
