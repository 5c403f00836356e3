"""Scoring of the bench: responses through the judge, and the averages of its scores.

- A rubric's score is the mean of the runs in which the judge gave one (`judge.parse_score`).
- A row's score is the mean of its rubrics' scores, over the rubrics that have one.
- The model's score is the mean over the rows that have one; each row has the same weight, whatever its source.

A missing score is left out of its mean and counted; a row without any score is left out of the model's mean and
counted. Intervals are 95 %, over rows (train/resampling.py). Scores by dimension are means over rubrics; rows are the
independent units there too.

Best of N picks one of N responses to each row:

- `first run`: the judge's first run picks, and the other runs alone score, so that the noise of one run does not both
  pick and score.
- `all runs`: the same runs pick and score; the result is an upper bound and reported as one.
- `file`: the given scores pick, and the judge sees only the picked response.
- `reward`: so do those of a reward model (`evaluation/models/rewards.py`).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from train.data.sources.formats import Message
from train.errors import UserError
from train.llm.client import Client
from train.llm.failures import count_reasons, shown_reasons
from train.llm.finish_reasons import describe_unfinished
from train.llm.judgement import JudgeClient, Judgement
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.multifaceted.bench.judging import judge_rubric
from train.multifaceted.bench.protocol import Protocol
from train.multifaceted.bench.rows import BenchRow

ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a row.

    - `text`: None if there is no response; `missing` is the reason.
    - `given_score`: the score that the file of responses or a reward model gives it.
    - `only_reasoning`: the model's reasoning never ended. The text is empty and judged as that.
    - `refused`: a filter withheld it, or the model's refusal was marked as one.
    """

    text: str | None
    missing: str = ""
    finish_reason: str = ""
    given_score: float | None = None
    only_reasoning: bool = False
    refused: bool = False

    @property
    def unfinished(self) -> str:
        """Return why it is not a complete response, as reports name it; empty if it is complete or not known."""
        if self.refused:
            return "refused"
        return describe_unfinished(self.finish_reason) if self.finish_reason else ""


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """A response with its judgements: [rubric][run], None for a run that was not asked."""

    response: Response
    judgements: tuple[tuple[Judgement[int] | None, ...], ...]

    def rubric_scores(self, runs: Sequence[int]) -> list[float | None]:
        """Return the score of each rubric: the mean of those of `runs` in which the judge gave one."""
        return [
            mean_of(run.verdict for run in (of_rubric[number] for number in runs) if run)
            for of_rubric in self.judgements
        ]

    def score(self, runs: Sequence[int]) -> float | None:
        """Return the mean of the rubrics that have a score."""
        return mean_of(self.rubric_scores(runs))

    @property
    def pending(self) -> bool:
        """Return whether some of its judgements are still to come."""
        return any(judgement is not None and judgement.missing == "pending" for judgement in chain(*self.judgements))


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A row with all its responses, in the order in which they were given. `picked`: None if none can be picked."""

    row: BenchRow
    responses: tuple[JudgedResponse, ...]
    picked: int | None
    protocol: Protocol

    @property
    def response(self) -> JudgedResponse | None:
        """Return the response that counts."""
        return None if self.picked is None else self.responses[self.picked]

    @property
    def score(self) -> float | None:
        """Return the row's score."""
        return self.response.score(self.protocol.scoring_runs) if self.response else None

    @property
    def rubric_scores(self) -> list[float | None]:
        """Return the score of each rubric."""
        if not self.response:
            return [None] * len(self.row.rubrics)
        return self.response.rubric_scores(self.protocol.scoring_runs)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def conversation(row: BenchRow, *, with_system: bool = True) -> list[Message]:
    """Return the prompt for the model; an empty system message is left out."""
    system: list[Message] = [{"role": "system", "content": row.system}] if with_system and row.system.strip() else []
    return [*system, {"role": "user", "content": row.prompt}]


async def judge_row(client: JudgeClient, protocol: Protocol, row: BenchRow, responses: Sequence[Response]) -> JudgedRow:
    """Have one row's responses judged, as far as the protocol asks for it. Raises UserError."""
    runs = range(protocol.judge.runs)
    judged: list[list[list[Judgement[int] | None]]] = [[[None for _ in runs] for _ in row.rubrics] for _ in responses]

    async def judge(numbers: Sequence[int], some_runs: Sequence[int]) -> None:
        slots = [
            (number, rubric, run)
            for number in numbers
            if responses[number].text is not None
            for rubric in range(len(row.rubrics))
            for run in some_runs
        ]
        judgements = await asyncio.gather(
            *(
                judge_rubric(client, protocol.judge, row, row.rubrics[rubric], responses[number].text or "", run)
                for number, rubric, run in slots
            )
        )
        for (number, rubric, run), judgement in zip(slots, judgements, strict=True):
            judged[number][rubric][run] = judgement

    def judged_responses() -> tuple[JudgedResponse, ...]:
        return tuple(
            JudgedResponse(response, tuple(map(tuple, of_rubrics)))
            for response, of_rubrics in zip(responses, judged, strict=True)
        )

    if protocol.picks_by_given_scores:
        given_scores = [response.given_score if response.text is not None else None for response in responses]
        picked = _highest(given_scores, responses)
        await judge([] if picked is None else [picked], runs)
    else:
        picking_runs = runs[:1] if protocol.picks_by_first_run else runs
        await judge(range(len(responses)), picking_runs)
        so_far = judged_responses()
        must_wait = protocol.best_of > 1 and any(response.pending for response in so_far)
        picked = None if must_wait else _highest([response.score(picking_runs) for response in so_far], responses)
        if protocol.picks_by_first_run and picked is not None:
            await judge([picked], runs[1:])
    return JudgedRow(row, judged_responses(), picked, protocol)


def _highest(scores: Sequence[float | None], responses: Sequence[Response]) -> int | None:
    """Return the number of the first highest score; without any score the number of the first response with text."""
    scored = [number for number, score in enumerate(scores) if score is not None]
    if scored:
        return max(scored, key=lambda number: (scores[number], -number))
    return next((number for number, response in enumerate(responses) if response.text is not None), None)


async def judge_rows(
    client: JudgeClient, protocol: Protocol, rows: Sequence[BenchRow], responses: Sequence[Sequence[Response]]
) -> list[JudgedRow]:
    """Return every row with its judgements, in order. Raises UserError."""

    async def work(number: int) -> JudgedRow:
        return await judge_row(client, protocol, rows[number], responses[number])

    judged: list[JudgedRow] = []
    of_servers = client if isinstance(client, Client) else None
    at_once = of_servers.concurrency if of_servers else ROWS_AT_ONCE
    stream: AsyncGenerator[JudgedRow] = map_ordered(range(len(rows)), work, at_once=at_once)
    bar = progress("judging", len(rows), of_servers) if of_servers else nullcontext()
    async with bar as judging, aclosing(stream) as judged_rows:
        async for row in judged_rows:
            judged.append(row)
            if judging:
                judging.advance()
    return judged


def refuse_without_responses(responses: Sequence[Sequence[Response]], option: str, advice: str = "") -> None:
    """Raise UserError with the reasons if no prompt got a response: the model was never measured.

    `option`: the option that names the source of the responses. `advice`: the option to change, as a sentence.
    """
    every = [response for of_row in responses for response in of_row]
    if all(response.text is None for response in every):
        reasons = shown_reasons(count_reasons(response.missing for response in every))
        raise UserError(f"{option}: none of the {len(responses):,} prompts got an answer: {reasons}. {advice}".rstrip())


def refuse_without_judgements(
    judged: Sequence[JudgedRow], option: str, advice: str = "", *, batch: bool = False
) -> None:
    """Raise UserError with the reasons if no judgement got an answer, and none is still to come.

    `advice`: the option to change, as a sentence. `batch`: answers come from files of a batch.
    """
    judgements = judgements_of(judged)
    if judgements and all(judgement.missing == "no answer" and not judgement.texts for judgement in judgements):
        reasons = shown_reasons(count_reasons(judgement.detail for judgement in judgements))
        next_step = "The responses of the model are kept, and the same command continues from there."
        if batch:
            next_step = "" if advice else WRITE_AGAIN
        raise UserError(
            f"{option}: none of the {len(judgements):,} judgements got an answer: {reasons}. {advice} "
            f"{next_step}".rstrip()
        )


WRITE_AGAIN = (
    "Errors in the files of --batch-in are final: leave out the file that holds them, and a new --batch-out writes "
    "these questions again."
)


def judgements_of(judged: Sequence[JudgedRow]) -> list[Judgement[int]]:
    """Return the judgements of all responses that were judged."""
    every = (chain(*response.judgements) for row in judged for response in row.responses)
    return [judgement for judgement in chain(*every) if judgement is not None]


def row_record(judged: JudgedRow, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of bench_rows.jsonl: the row's score, and every response with all answers of the judge.

    `protocol`: the settings by which a file is compared, wherever it is copied to.
    """
    row, settings = judged.row, judged.protocol.judge
    return {
        "id": row.id,
        "source": row.source,
        "system": row.system,
        "prompt": row.prompt,
        "judge": settings.model + (" (shown the system message)" if settings.show_system else ""),
        "protocol": dict(protocol),
        "score": judged.score,
        "picked": judged.picked,
        "response": judged.response.response.text if judged.response else None,
        "rubrics": [
            {"criteria": rubric.criteria, "dimension": rubric.dimension, "subdimension": rubric.subdimension,
             "score": score}
            for rubric, score in zip(row.rubrics, judged.rubric_scores, strict=True)
        ],
        "answers": [_response_record(response) for response in judged.responses],
    }  # fmt: skip


def _response_record(judged: JudgedResponse) -> dict[str, Any]:
    response = judged.response
    record: dict[str, Any] = {"response": response.text, "finish_reason": response.finish_reason}
    if response.text is None:
        record["missing"] = response.missing
    if response.given_score is not None:
        record["scorer"] = response.given_score
    record["judgements"] = [
        [judgement and _judgement_record(judgement) for judgement in of_rubric] for of_rubric in judged.judgements
    ]
    return record


def _judgement_record(judgement: Judgement[int]) -> dict[str, Any]:
    record: dict[str, Any] = {"score": judgement.verdict, "texts": list(judgement.texts)}
    if judgement.missing:
        record |= {"missing": judgement.missing, "detail": judgement.detail}
    return record
