"""The judge of Multifaceted Bench: one rubric of one answer at a time, as the JANUS paper asks it (arXiv:2405.17977).

The judge gets the instruction, the answer, the reference answer as an example of a 5, and one rubric with its five
descriptions, in one user message of our own words, and ends with `[RESULT] n`. It never gets the system message: what
that asks for stands in the rubrics. `show_system` gives it all the same, and is no longer the paper's protocol.

An answer of the judge that holds no score is asked for again, up to `retries` times in each run, each time as another
sample. One that the token limit cut holds none, whatever its last words look like: it hadn't come to its end. What then
still has no score is missing, never a zero and never a None in a mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from train.llm.client import NoAnswerError
from train.llm.journal import Answer, Request
from train.llm.reasoning import LEFT, events_of, read_answer
from train.multifaceted.bench_rows import BenchRow, Rubric
from train.multifaceted.protocol import JudgeSettings

STAGE = "judge, run {run}"

_TASK = """\
You grade one answer, written by a language model, on a single criterion.

You are given the instruction that the model received, the answer to be graded, a reference answer that would earn the \
highest score, and the criterion with a description of each score from 1 to 5.

First explain in a few sentences which description fits the answer best and what in the answer shows this. Consider \
only this criterion. The reference answer shows what a 5 looks like; a differently worded answer can also earn a 5. \
Then give the score on a final line in this form, [RESULT] followed by the number alone, and write nothing after it:
[RESULT] (a whole number from 1 to 5)"""

PROMPT_VERSION = 2
"""The wording of the judge's prompt, for bench.json. Raise it with every change of wording: scores under two wordings
are not comparable."""

_TAG = re.compile(r"[\[【［]\s{0,3}result\s{0,3}\\?[\]】］]+", re.IGNORECASE | re.ASCII)
_OPENING = r"(?:[\s:：=*_`~\"'“‘(\[{<$]|\\boxed|\\text)*+"
_CLOSING = r"[*_`~\"'”’)\]}>$]*+"
_NUMBER_WORD = r"(?:one|two|three|four|five|six|seven|eight|nine|ten)\b"
_DIGIT = r"(?P<score>[1-5])(?![^\W_])"
_OUT_OF_FIVE = rf"(?:[^\S\n]*(?:[/⁄]|out[^\S\n]+of)[^\S\n]*{_OPENING}(?:5|five)(?![^\W_]){_CLOSING})?+"
_GOES_ON = rf"[^\S\n]*(?:[+%]|(?:[^\w\s]{{1,3}}|to\b|or\b|and\b|out[^\S\n]+of\b)?[^\S\n]*[(\[]?(?:\d|{_NUMBER_WORD}))"
_NAME = r"(?:(?:the|my|final|overall)\s+)*(?:score|result|rating|grade)\s*(?:of\b|is\b|[:=])?"
_AFTER_TAG = re.compile(
    rf"{_OPENING}(?:[-–—]\s+|(?:[-=]>|→)\s*)?(?:{_NAME}{_OPENING})?{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}(?!{_GOES_ON})",
    re.IGNORECASE,
)
_IN_BRACKETS = re.compile(
    rf"(?<![\w\]])\[\s*(?:score\s*(?:of\b|[:=])?\s*)?{_DIGIT}\s*{_OUT_OF_FIVE}\]?[\s.!*_]*\Z", re.I
)
_LAST_WORDS = re.compile(
    rf"\bscore\s*(?:of\b|is\b|[:=])?{_OPENING}{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}[\s.!*_]*\Z", re.IGNORECASE
)
_ON_ITS_OWN_LINE = re.compile(
    rf"(?:\{{.*)?[^\w\n]*+(?:{_NAME}{_OPENING}[\]}}>]*+(?:[-–—]\s+)?|(?<=\\)boxed){_OPENING}"
    rf"{_DIGIT}{_CLOSING}{_OUT_OF_FIVE}[^\w+%]*(?:result>)?",
    re.IGNORECASE,
)
_NOT_A_VERDICT = re.compile(
    r"\b(?:no|not|never|without|would|could|should|might|from|below|above|under|over|than|between|short|if|unless)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
_LOOKED_AT = 300
"""Characters after the tag, or before the end, in which a score stands: more are another text."""


def parse_score(text: str) -> int | None:
    """The score that a judge's answer ends in, 1 to 5; None where it can't be told. Never raises.

    The last `[RESULT]`, in any case, decides alone: what follows it must be the number, perhaps in marks (`**4**`,
    `(5)`), after a colon or a name (`Score:`, `score of`), and before `/5` or `out of 5`. A number that goes on is no
    score: 10, 4.5, 4-5, "4 or 5", 4/10, "5 out of 10", 4+. An earlier `[RESULT]`, which may be quoted from the answer
    that is graded, doesn't count, even where the last one is followed by something else. Digits are those of ASCII.
    What stands after the score, in other words or on further lines, is passed over. Brackets may be escaped (`\\[`) or
    Chinese ones (`【RESULT】`).

    Without any `[RESULT]` the text must end in `[3]`, `[Score 4]`, `(Score 5)`, `score: 3` or `score of 1`, the last
    two not in a sentence that says what is not the case ("keeps it from a score of 5"); or its last line must be the
    score alone under a name (`**Result: 4**`, `[RESULT: 4]`, `Grade: 4/5`, `{"result": 4}`) or in a box
    (`\\boxed{4}`). Within a sentence these two may be quoted from the answer.
    """
    tags = list(_TAG.finditer(text))
    if tags:
        found = _AFTER_TAG.match(text[tags[-1].end() :][:_LOOKED_AT])
        return int(found["score"]) if found else None
    end = text.rstrip()[-_LOOKED_AT:]
    if found := _IN_BRACKETS.search(end):
        return int(found["score"]) if "]" in found[0] else None
    if found := _LAST_WORDS.search(end):
        sentence = re.split(r"[.!?\n]", end[: found.start()])[-1]
        return None if _NOT_A_VERDICT.search(sentence) else int(found["score"])
    last_line = end.rstrip(" \n$`*\\]}").rpartition("\n")[2]
    found = _ON_ITS_OWN_LINE.fullmatch(last_line)
    return int(found["score"]) if found else None


def judge_prompt(row: BenchRow, rubric: Rubric, response: str, *, show_system: bool = False) -> str:
    """Return the question for the judge, with the system message only if `show_system` is set."""
    parts = [_TASK]
    if show_system:
        parts.append(f"### System message that the model received\n{row.system}")
    scores = "\n".join(f"{score}: {text}" for score, text in enumerate(rubric.descriptions, 1))
    parts += [
        f"### Instruction\n{row.prompt}",
        f"### Answer to be graded\n{response}",
        f"### Reference answer (score 5)\n{row.reference}",
        f"### Criterion\n{rubric.criteria}",
        f"### Score descriptions\n{scores}",
    ]
    return "\n\n".join(parts)


class NotYetError(Exception):
    """The answer may still come: it has been, or is to be, asked for in a batch file."""


class Asker(Protocol):
    """Whoever gets the judge's answers: the client of servers, or a journal that batch files have filled."""

    async def ask(self, request: Request) -> Answer:
        """The answer. Raises NoAnswerError where none will come, and NotYetError where none has come yet."""
        ...


Missing = Literal["unparsable", "no answer", "pending"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """One run of the judge on one rubric. `texts`: all that it said, the answers without a score first.

    `missing` says why `score` is None. `faults`: what was wrong with each answer that had none.
    """

    score: int | None
    texts: tuple[str, ...]
    missing: Missing | None = None
    detail: str = ""
    faults: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    cleaned: tuple[str, ...] = ()
    """What was taken out of its answers, in the words of `train.llm.reasoning`."""


async def judge_rubric(
    asker: Asker, settings: JudgeSettings, row: BenchRow, rubric: Rubric, response: str, run: int
) -> Judgement:
    """Ask about one rubric in run `run` (from 0), again where the answer holds no score. Raises UserError."""
    messages = [{"role": "user", "content": judge_prompt(row, rubric, response, show_system=settings.show_system)}]
    texts: list[str] = []
    faults: list[str] = []
    cleaned: list[str] = []
    tokens = {"prompt": 0, "completion": 0}

    def judged(score: int | None, missing: Missing | None = None, detail: str = "") -> Judgement:
        return Judgement(score, tuple(texts), missing, detail, tuple(faults), tokens, tuple(cleaned))

    for sample in range(settings.retries + 1):
        request = Request(STAGE.format(run=run + 1), messages, settings.decoding, sample)
        try:
            answer = await asker.ask(request)
        except NoAnswerError as failure:
            return judged(None, "no answer", str(failure))
        except NotYetError:
            return judged(None, "pending")
        texts.append(answer.text)
        tokens["prompt"] += answer.prompt_tokens or 0
        tokens["completion"] += answer.completion_tokens or 0
        read, said = read_answer(answer)
        cleaned.extend(event for event in events_of(said) if event not in LEFT)
        score = parse_score(read.text)
        if fault := _fault(read, score):
            faults.append(fault)
        else:
            return judged(score)
    return judged(None, "unparsable", faults[-1])


def _fault(answer: Answer, score: int | None) -> str:
    """Why an answer of the judge gives no score; nothing where it does."""
    # One that hadn't come to its end holds none: what looks like its result may be a quotation. Where the server tells
    # nothing of ends, the score must do.
    unfinished = "" if answer.ending == "unstated" and not answer.refused else answer.unfinished
    return unfinished or ("no score at its end" if score is None else "")
