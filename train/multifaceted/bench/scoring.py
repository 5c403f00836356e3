"""Multifaceted Bench: answers to its rows through the judge, and what the scores amount to.

What is averaged, exactly:

- A rubric's score is the mean of the runs in which the judge gave one (`judge.parse_score`).
- A row's score is the mean of its rubrics' scores, over the rubrics that have one.
- The model's score is the mean over the rows that have one; each row weighs alike, whatever its source.

A score that is missing is left out of its mean and counted; a row without any is left out of the model's mean and
counted. Intervals are 95 %, over rows (train/resampling.py); scores by dimension are means over rubrics, and there too
it is rows that are independent.

Best of N picks one of N answers to each row. By the judge's first run (`first run`), the other runs alone give the
score: the luck of one run doesn't both pick and score, though it is the same judge. By all runs (`all runs`) it is an
upper bound and called one. By someone's own scores (`file`) the judge sees the picked answer alone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from train.data.sources.formats import Message
from train.errors import UserError
from train.llm.client import Client
from train.llm.failures import FailureReasons
from train.llm.finish_reasons import describe_unfinished
from train.llm.ordered_map import map_ordered
from train.llm.progress import progress
from train.multifaceted.bench.judging import JudgeClient, Judgement, judge_rubric
from train.multifaceted.bench.protocol import Protocol
from train.multifaceted.bench.rows import NOT_STATED, BenchRow
from train.resampling import estimate_means

ROWS_AT_ONCE = 64
_SCORES = (1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a row; `text` is None where there is none: `missing` says why. `scorer`: someone's own score.

    `only_reasoning`: the model's reasoning never ended. Its text is empty and judged as that: it failed to answer.
    """

    text: str | None
    missing: str = ""
    finish_reason: str = ""
    scorer: float | None = None
    only_reasoning: bool = False
    refused: bool = False
    """A filter withheld it, or the model's refusal came marked as one."""

    @property
    def unfinished(self) -> str:
        """Return why it is not a complete answer, in the words of the reports; nothing where it is, or unknown."""
        if self.refused:
            return "refused"
        return describe_unfinished(self.finish_reason) if self.finish_reason else ""


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """What the judge said of one answer. `judgements`: [rubric][run], None where that run wasn't asked."""

    response: Response
    judgements: tuple[tuple[Judgement | None, ...], ...]

    def rubric_score(self, rubric: int, runs: Sequence[int]) -> float | None:
        """The mean of those runs in which the judge gave a score."""
        found = [one.score for run in runs if (one := self.judgements[rubric][run]) and one.score is not None]
        return fmean(found) if found else None

    def score(self, runs: Sequence[int]) -> float | None:
        """The mean of the rubrics that have a score."""
        found = [self.rubric_score(rubric, runs) for rubric in range(len(self.judgements))]
        return mean_of(found)

    @property
    def pending(self) -> bool:
        """Whether the judge has yet to say something of it."""
        return any(one is not None and one.missing == "pending" for runs in self.judgements for one in runs)


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A row with all its answers, in the order in which they were given. `picked` is None where none can be."""

    row: BenchRow
    answers: tuple[JudgedResponse, ...]
    picked: int | None
    protocol: Protocol

    @property
    def answer(self) -> JudgedResponse | None:
        """The answer that counts."""
        return None if self.picked is None else self.answers[self.picked]

    @property
    def score(self) -> float | None:
        """The row's score."""
        return self.answer.score(self.protocol.scoring_runs) if self.answer else None

    @property
    def rubric_scores(self) -> list[float | None]:
        """The score of each rubric."""
        if not self.answer:
            return [None] * len(self.row.rubrics)
        return [self.answer.rubric_score(number, self.protocol.scoring_runs) for number in range(len(self.row.rubrics))]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def conversation(row: BenchRow, *, with_system: bool = True) -> list[Message]:
    """What the model is asked: an empty system message is none, and takes nothing else with it."""
    system: list[Message] = [{"role": "system", "content": row.system}] if with_system and row.system.strip() else []
    return [*system, {"role": "user", "content": row.prompt}]


async def judge_row(asker: JudgeClient, protocol: Protocol, row: BenchRow, responses: Sequence[Response]) -> JudgedRow:
    """Take one row's answers to the judge, as far as the protocol wants them judged. Raises UserError."""
    runs = range(protocol.judge.runs)
    judged: list[list[list[Judgement | None]]] = [[[None for _ in runs] for _ in row.rubrics] for _ in responses]

    async def judge(numbers: Sequence[int], which: Sequence[int]) -> None:
        places = [
            (number, rubric, run)
            for number in numbers
            if responses[number].text is not None
            for rubric in range(len(row.rubrics))
            for run in which
        ]
        found = await asyncio.gather(
            *(
                judge_rubric(asker, protocol.judge, row, row.rubrics[rubric], responses[number].text or "", run)
                for number, rubric, run in places
            )
        )
        for (number, rubric, run), judgement in zip(places, found, strict=True):
            judged[number][rubric][run] = judgement

    def so_far() -> tuple[JudgedResponse, ...]:
        return tuple(
            JudgedResponse(response, tuple(map(tuple, of_rubrics)))
            for response, of_rubrics in zip(responses, judged, strict=True)
        )

    everything = range(len(responses))
    if protocol.best_of > 1 and protocol.pick_by == "file":
        picked = _highest([response.scorer if response.text is not None else None for response in responses], responses)
        await judge([] if picked is None else [picked], runs)
    else:
        picking_runs = runs[:1] if protocol.picks_by_first_run else runs
        await judge(everything, picking_runs)
        answers = so_far()
        wait = protocol.best_of > 1 and any(answer.pending for answer in answers)
        picked = None if wait else _highest([answer.score(picking_runs) for answer in answers], responses)
        if protocol.picks_by_first_run and picked is not None:
            await judge([picked], runs[1:])
    return JudgedRow(row, so_far(), picked, protocol)


def _highest(scores: Sequence[float | None], responses: Sequence[Response]) -> int | None:
    """The first of the highest scores; where there are none the first answer that is there."""
    scored = [number for number, score in enumerate(scores) if score is not None]
    if scored:
        return max(scored, key=lambda number: (scores[number], -number))
    return next((number for number, response in enumerate(responses) if response.text is not None), None)


async def judge_rows(
    asker: JudgeClient, protocol: Protocol, rows: Sequence[BenchRow], responses: Sequence[Sequence[Response]]
) -> list[JudgedRow]:
    """Every row through the judge, in order. Raises UserError."""

    async def work(number: int) -> JudgedRow:
        return await judge_row(asker, protocol, rows[number], responses[number])

    judged: list[JudgedRow] = []
    client = asker if isinstance(asker, Client) else None
    at_once = client.concurrency if client else ROWS_AT_ONCE
    done: AsyncGenerator[JudgedRow] = map_ordered(range(len(rows)), work, at_once=at_once)
    async with progress("judging", len(rows), client) if client else nullcontext() as pace, aclosing(done) as outcomes:
        async for outcome in outcomes:
            judged.append(outcome)
            if pace:
                pace.advance()
    return judged


def reasons(why: Iterable[str]) -> dict[str, int]:
    """How often each kind of reason comes, the most frequent first."""
    found = FailureReasons()
    for one in why:
        found.add(one or "no reason given")
    return found.counts()


def in_words(why: Mapping[str, int]) -> str:
    """The reason alone, or the first three with how often each comes; without the full stop."""
    if len(why) == 1:
        return next(iter(why)).rstrip(".")
    return "; ".join(f"{count:,} times: {reason}" for reason, count in list(why.items())[:3]).rstrip(".")


def refuse_without_responses(responses: Sequence[Sequence[Response]], whose: str, advice: str = "") -> None:
    """Raise UserError, which says why, where not one prompt got an answer: the model was never measured.

    `whose`: the option that names who was to give them. `advice`: the option to change, as a sentence.
    """
    answers = [one for of_row in responses for one in of_row]
    if all(one.text is None for one in answers):
        why = in_words(reasons(one.missing for one in answers))
        raise UserError(f"{whose}: none of the {len(responses):,} prompts got an answer: {why}. {advice}".rstrip())


def refuse_without_judgements(
    judged: Sequence[JudgedRow], whose: str, advice: str = "", *, batch: bool = False
) -> None:
    """Raise UserError, which says why, where not one judgement got an answer, and none may still come.

    `advice`: the option to change, as a sentence. `batch`: answers come from files of a batch.
    """
    judgements = _judgements(judged)
    if judgements and all(one.missing == "no answer" and not one.texts for one in judgements):
        why = in_words(reasons(one.detail for one in judgements))
        go_on = "What the model answered is kept, and the same command goes on from there."
        if batch:
            go_on = "" if advice else WRITE_AGAIN
        raise UserError(
            f"{whose}: none of the {len(judgements):,} judgements got an answer: {why}. {advice} {go_on}".rstrip()
        )


WRITE_AGAIN = (
    "Errors in the files of --batch-in are final: leave out the file that holds them, and a new --batch-out writes "
    "these questions again."
)


def _judgements(judged: Sequence[JudgedRow]) -> list[Judgement]:
    return [
        one for row in judged for answer in row.answers for runs in answer.judgements for one in runs if one is not None
    ]


def figures(judged: Sequence[JudgedRow], protocol: Protocol, *, seed: int = 0) -> dict[str, Any]:
    """All that the scores amount to, for JSON; the names are those of bench.json."""
    scores = [row.score for row in judged]
    by_source: dict[str, list[int]] = {}
    by_dimension: dict[str, list[tuple[int, float | None]]] = {}
    by_subdimension: dict[str, list[tuple[int, float | None]]] = {}
    for number, one in enumerate(judged):
        by_source.setdefault(one.row.source, []).append(number)
        for rubric, score in zip(one.row.rubrics, one.rubric_scores, strict=True):
            dimension = rubric.dimension or NOT_STATED
            below = f"{dimension}/{rubric.subdimension or NOT_STATED}"
            by_dimension.setdefault(dimension, []).append((number, score))
            by_subdimension.setdefault(below, []).append((number, score))
    found: dict[str, Any] = {
        "score": _estimate(list(enumerate(scores)), seed),
        "by_source": {
            name: _estimate([(number, scores[number]) for number in numbers], seed)
            for name, numbers in sorted(by_source.items())
        },
        "by_dimension": {name: _estimate(values, seed) for name, values in sorted(by_dimension.items())},
        "by_subdimension": {name: _estimate(values, seed) for name, values in sorted(by_subdimension.items())},
        "runs": _agreement(judged, protocol),
        "missing": _missing(judged, protocol),
    }
    if protocol.best_of > 1:
        found["best_of"] = _best_of(judged, protocol, seed)
    return found


def _estimate(values: Sequence[tuple[int, float | None]], seed: int) -> dict[str, Any]:
    """Mean and interval of scores, each with the number of its row; `of`: how many there are with those missing."""
    there = [(row, score) for row, score in values if score is not None]
    record: dict[str, Any] = {"mean": None, "low": None, "high": None, "rows": 0, "interval": "none: too few"}
    if there:
        column = np.array([[score] for _, score in there])
        rows = np.array([row for row, _ in there])
        (found,) = estimate_means(column, rows, np.zeros(1), [_SCORES], seed=seed, permutations=0)
        record = {"mean": found.mean, "low": found.low, "high": found.high}
        record |= {"rows": found.groups, "interval": found.interval}
    return record | {"scored": len(there), "of": len(values)}


def _agreement(judged: Sequence[JudgedRow], protocol: Protocol) -> dict[str, Any]:
    """How far the judge agrees with itself, from run to run."""
    by_run = [
        mean_of([row.answer.score([run]) if row.answer else None for row in judged]) for run in protocol.scoring_runs
    ]
    several = []
    verbatim = []
    for row in judged:
        for runs in row.answer.judgements if row.answer else ():
            texts = [one.texts[0] for run in protocol.scoring_runs if (one := runs[run]) and one.texts]
            verbatim += [len(set(texts)) == 1] if len(texts) > 1 else []
            found = [one.score for run in protocol.scoring_runs if (one := runs[run]) and one.score is not None]
            if len(found) > 1:
                several.append(found)
    there = [score for score in by_run if score is not None]
    return {
        "numbers": [run + 1 for run in protocol.scoring_runs],
        "scores": by_run,
        "std_of_scores": stdev(there) if len(there) > 1 else None,
        "std_within_a_rubric": fmean(map(stdev, several)) if several else None,
        "rubrics_in_agreement": fmean(len(set(found)) == 1 for found in several) if several else None,
        "rubrics_with_two_runs": len(several),
        "rubrics_with_the_same_words": fmean(verbatim) if verbatim else None,
    }


def _missing(judged: Sequence[JudgedRow], protocol: Protocol) -> dict[str, Any]:
    """What isn't there, and what the judge was asked for again. `judgements` are all runs on all answers judged."""
    judgements = _judgements(judged)
    why = Counter(one.missing for one in judgements if one.missing)
    faults = Counter(fault for one in judgements for fault in one.faults)
    endings = Counter(words for row in judged for one in row.answers if (words := one.response.unfinished))
    return {
        "rows_without_response": sum(all(one.response.text is None for one in row.answers) for row in judged),
        "why_no_response": reasons(
            one.response.missing for row in judged for one in row.answers if one.response.text is None
        ),
        "rows_without_score": sum(row.score is None for row in judged),
        "rows_with_some_rubrics_missing": sum(
            row.score is not None and any(score is None for score in row.rubric_scores) for row in judged
        ),
        "judgements": len(judgements),
        "judgements_missing": {reason: why[reason] for reason in ("unparsable", "no answer", "pending")}
        | {reason: why[reason] for reason in ("refused", "unfinished") if why[reason]},
        "why_no_judgement": reasons(one.detail for one in judgements if one.missing == "no answer"),
        "judge_answers": sum(len(one.texts) for one in judgements),
        "judge_answers_without_score": dict(sorted(faults.items())),
        "judge_answers_cleaned": dict(sorted(Counter(event for one in judgements for event in one.cleaned).items())),
        "judge_tokens": {name: sum(one.tokens.get(name, 0) for one in judgements) for name in ("prompt", "completion")},
        "responses_cut": endings.pop("cut at the token limit", 0),
        "responses_only_reasoning": sum(one.response.only_reasoning for row in judged for one in row.answers),
        "responses_empty": sum(
            one.response.text == "" and not one.response.refused for row in judged for one in row.answers
        ),
        "responses_ended_otherwise": dict(sorted(endings.items())),
    }


def _best_of(judged: Sequence[JudgedRow], protocol: Protocol, seed: int) -> dict[str, Any]:
    """What the pick has to be compared with: the mean of all answers, by the runs in which all were judged."""
    record: dict[str, Any] = {
        "answers": protocol.best_of,
        "picked_by": protocol.pick_by,
        "upper_bound": protocol.pick_by == "all runs",
        "fewer_answers": sum(
            sum(one.response.text is not None for one in row.answers) < protocol.best_of for row in judged
        ),
    }
    if protocol.pick_by != "file":
        runs = range(1) if protocol.picks_by_first_run else protocol.scoring_runs
        of_all = [mean_of([answer.score(runs) for answer in row.answers]) for row in judged]
        record["all_answers"] = _estimate(list(enumerate(of_all)), seed) | {"runs": [run + 1 for run in runs]}
    return record


def row_record(judged: JudgedRow, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A line of bench_rows.jsonl: the row's score, and every answer with all that the judge said of it.

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
        "response": judged.answer.response.text if judged.answer else None,
        "rubrics": [
            {"criteria": rubric.criteria, "dimension": rubric.dimension, "subdimension": rubric.subdimension,
             "score": score}
            for rubric, score in zip(row.rubrics, judged.rubric_scores, strict=True)
        ],
        "answers": [_answer_record(answer) for answer in judged.answers],
    }  # fmt: skip


def _answer_record(answer: JudgedResponse) -> dict[str, Any]:
    record: dict[str, Any] = {"response": answer.response.text, "finish_reason": answer.response.finish_reason}
    if answer.response.text is None:
        record["missing"] = answer.response.missing
    if answer.response.scorer is not None:
        record["scorer"] = answer.response.scorer
    record["judgements"] = [
        [
            one
            and {"score": one.score, "texts": list(one.texts)}
            | ({"missing": one.missing, "detail": one.detail} if one.missing else {})
            for one in runs
        ]
        for runs in answer.judgements
    ]
    return record
