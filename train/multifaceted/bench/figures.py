"""Figures of the bench: averages with intervals, the judge's agreement with itself, and counts of missing scores.

train/multifaceted/bench/scoring.py defines the averages.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from train.llm.failures import count_reasons
from train.multifaceted.bench.protocol import Protocol
from train.multifaceted.bench.rows import NOT_STATED
from train.multifaceted.bench.scoring import JudgedRow, judgements_of, mean_of
from train.resampling import estimate_means

_SCORES = (1.0, 5.0)


def figures(judged: Sequence[JudgedRow], protocol: Protocol, *, seed: int = 0) -> dict[str, Any]:
    """Return the averages, agreements and counts of missing scores; the keys are those of bench.json."""
    scores = [row.score for row in judged]
    by_source: dict[str, list[int]] = {}
    by_dimension: dict[str, list[tuple[int, float | None]]] = {}
    by_subdimension: dict[str, list[tuple[int, float | None]]] = {}
    for number, row in enumerate(judged):
        by_source.setdefault(row.row.source, []).append(number)
        for rubric, score in zip(row.row.rubrics, row.rubric_scores, strict=True):
            dimension = rubric.dimension or NOT_STATED
            subdimension = f"{dimension}/{rubric.subdimension or NOT_STATED}"
            by_dimension.setdefault(dimension, []).append((number, score))
            by_subdimension.setdefault(subdimension, []).append((number, score))
    record: dict[str, Any] = {
        "score": _estimate(list(enumerate(scores)), seed),
        "by_source": {
            name: _estimate([(number, scores[number]) for number in numbers], seed)
            for name, numbers in sorted(by_source.items())
        },
        "by_dimension": {name: _estimate(values, seed) for name, values in sorted(by_dimension.items())},
        "by_subdimension": {name: _estimate(values, seed) for name, values in sorted(by_subdimension.items())},
        "runs": _agreement(judged, protocol),
        "missing": _missing(judged),
    }
    if protocol.best_of > 1:
        record["best_of"] = _best_of(judged, protocol, seed)
    return record


def _estimate(values: Sequence[tuple[int, float | None]], seed: int) -> dict[str, Any]:
    """Return mean and interval of (row number, score). `of`: the count of scores, missing ones included."""
    scored = [(row, score) for row, score in values if score is not None]
    record: dict[str, Any] = {"mean": None, "low": None, "high": None, "rows": 0, "interval": "none: too few"}
    if scored:
        column = np.array([[score] for _, score in scored])
        rows = np.array([row for row, _ in scored])
        (estimate,) = estimate_means(column, rows, np.zeros(1), [_SCORES], seed=seed, permutations=0)
        record = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
        record |= {"rows": estimate.groups, "interval": estimate.interval}
    return record | {"scored": len(scored), "of": len(values)}


def _agreement(judged: Sequence[JudgedRow], protocol: Protocol) -> dict[str, Any]:
    """Return how far the judge agrees with itself from run to run."""
    runs = protocol.scoring_runs
    by_run = [mean_of(row.response.score([run]) if row.response else None for row in judged) for run in runs]
    grades: list[list[int]] = []
    verbatim: list[bool] = []
    for of_rubric in (of_rubric for row in judged if row.response for of_rubric in row.response.judgements):
        judgements = [judgement for run in runs if (judgement := of_rubric[run])]
        texts = [judgement.texts[0] for judgement in judgements if judgement.texts]
        verbatim += [len(set(texts)) == 1] if len(texts) > 1 else []
        scores = [judgement.verdict for judgement in judgements if judgement.verdict is not None]
        grades += [scores] if len(scores) > 1 else []
    scored = [score for score in by_run if score is not None]
    return {
        "numbers": [run + 1 for run in runs],
        "scores": by_run,
        "std_of_scores": stdev(scored) if len(scored) > 1 else None,
        "std_within_a_rubric": fmean(map(stdev, grades)) if grades else None,
        "rubrics_in_agreement": fmean(len(set(scores)) == 1 for scores in grades) if grades else None,
        "rubrics_with_two_runs": len(grades),
        "rubrics_with_the_same_words": fmean(verbatim) if verbatim else None,
    }


def _missing(judged: Sequence[JudgedRow]) -> dict[str, Any]:
    """Return counts of missing scores and of repeated requests. `judgements`: all runs on all judged responses."""
    judgements = judgements_of(judged)
    kinds = Counter(judgement.missing for judgement in judgements if judgement.missing)
    errors = Counter(error for judgement in judgements for error in judgement.errors)
    cleaned = Counter(event for judgement in judgements for event in judgement.cleaned)
    responses = [judged_response.response for row in judged for judged_response in row.responses]
    endings = Counter(ending for response in responses if (ending := response.unfinished))
    return {
        "rows_without_response": sum(all(part.response.text is None for part in row.responses) for row in judged),
        "why_no_response": count_reasons(response.missing for response in responses if response.text is None),
        "rows_without_score": sum(row.score is None for row in judged),
        "rows_with_some_rubrics_missing": sum(row.score is not None and None in row.rubric_scores for row in judged),
        "judgements": len(judgements),
        "judgements_missing": {reason: kinds[reason] for reason in ("unparsable", "no answer", "pending")}
        | {reason: kinds[reason] for reason in ("refused", "unfinished") if kinds[reason]},
        "why_no_judgement": count_reasons(part.detail for part in judgements if part.missing == "no answer"),
        "judge_answers": sum(len(judgement.texts) for judgement in judgements),
        "judge_answers_without_score": dict(sorted(errors.items())),
        "judge_answers_cleaned": dict(sorted(cleaned.items())),
        "judge_tokens": {
            name: sum(part.tokens.get(name, 0) for part in judgements) for name in ("prompt", "completion")
        },
        "responses_cut": endings.pop("cut at the token limit", 0),
        "responses_only_reasoning": sum(response.only_reasoning for response in responses),
        "responses_empty": sum(response.text == "" and not response.refused for response in responses),
        "responses_ended_otherwise": dict(sorted(endings.items())),
    }


def _best_of(judged: Sequence[JudgedRow], protocol: Protocol, seed: int) -> dict[str, Any]:
    """Return the baseline of the pick: the mean of all responses, over the runs in which all were judged."""
    record: dict[str, Any] = {
        "answers": protocol.best_of,
        "picked_by": protocol.picked_by,
        "upper_bound": protocol.pick_by == "all runs",
        "fewer_answers": sum(
            sum(part.response.text is not None for part in row.responses) < protocol.best_of for row in judged
        ),
    }
    if not protocol.picks_by_given_scores:
        runs = range(1) if protocol.picks_by_first_run else protocol.scoring_runs
        of_all = [mean_of(response.score(runs) for response in row.responses) for row in judged]
        record["all_answers"] = _estimate(list(enumerate(of_all)), seed) | {"runs": [run + 1 for run in runs]}
    return record
