"""TODO: train.multifaceted.bench.scoring.judging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from train.llm.failures import RequestFailed
from train.llm.journal import Answer, Request
from train.llm.reasoning.answer import LEFTOVER_EVENTS, list_events, read_answer
from train.multifaceted.bench.protocol import JudgeSettings
from train.multifaceted.bench.rows import BenchRow, Rubric
from train.multifaceted.judge import Missing, parse_score

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


class PendingError(Exception):
    """The answer may still come: it has been, or is to be, asked for in a batch file."""


class JudgeClient(Protocol):
    """Whoever gets the judge's answers: the client of servers, or a journal that batch files have filled."""

    async def ask(self, request: Request) -> Answer:
        """The answer. Raises RequestFailed where none will come, and NotYetError where none has come yet."""
        ...


NO_SCORE = "no score at its end"
"""The fault of an answer that is complete."""


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
    """Events of reading its answers, in the words of `train.llm.reasoning.answer`."""


async def judge_rubric(
    asker: JudgeClient, settings: JudgeSettings, row: BenchRow, rubric: Rubric, response: str, run: int
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
        except RequestFailed as failure:
            return judged(None, "no answer", str(failure))
        except PendingError:
            return judged(None, "pending")
        texts.append(answer.text)
        tokens["prompt"] += answer.prompt_tokens or 0
        tokens["completion"] += answer.completion_tokens or 0
        read, said = read_answer(answer)
        cleaned.extend(event for event in list_events(said) if event not in LEFTOVER_EVENTS)
        score = parse_score(read.text)
        if fault := _fault(read, score):
            faults.append(fault)
        else:
            return judged(score)
    kind: Missing = "refused" if set(faults) == {"refused"} else "unfinished"
    return judged(None, "unparsable" if NO_SCORE in faults else kind, faults[-1])


def _fault(answer: Answer, score: int | None) -> str:
    """Why an answer of the judge gives no score; nothing where it does."""
    # One that hadn't come to its end holds none: what looks like its result may be a quotation. Where the server tells
    # nothing of ends, the score must do.
    unfinished = "" if answer.ending == "unstated" and not answer.refused else answer.unfinished
    return unfinished or (NO_SCORE if score is None else "")
