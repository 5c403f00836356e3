"""The judge of Multifaceted Bench: one rubric of one response per request, as in the JANUS paper (arXiv:2405.17977).

- The judge gets the instruction, the response, the reference answer as an example of a 5, and one rubric with its five
  descriptions, in one user message of our own wording, and ends with `[RESULT] n`.
- It never gets the system message: the rubrics cover its demands. `show_system` adds it, which departs from the paper.
- An answer without a score is asked for again, up to `retries` times in each run, each time as another sample. An
  answer that was cut at the token limit has no score, whatever its last words look like.
- A score that is still missing stays missing: it is never a zero and never part of a mean.
"""

from train.llm.judgement import JudgeClient, Judgement, judge
from train.llm.request import Request
from train.multifaceted.bench.protocol import JudgeSettings
from train.multifaceted.bench.rows import BenchRow, Rubric
from train.multifaceted.judge import parse_score

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
"""Version of the judge's prompt, for bench.json. Raise it with every change of wording: scores under two wordings are
not comparable."""


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


NO_SCORE = "no score at its end"
"""The error of an answer that is complete."""


async def judge_rubric(
    client: JudgeClient, settings: JudgeSettings, row: BenchRow, rubric: Rubric, response: str, run: int
) -> Judgement[int]:
    """Ask about one rubric in run `run` (from 0), again if an answer has no score. Raises UserError."""
    messages = [{"role": "user", "content": judge_prompt(row, rubric, response, show_system=settings.show_system)}]
    stage = STAGE.format(run=run + 1)
    tries = [Request(stage, messages, settings.decoding, sample) for sample in range(settings.retries + 1)]
    return await judge(client, tries, parse_score, no_verdict=NO_SCORE)
