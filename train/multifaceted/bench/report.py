"""Report of the bench: bench.json, the section of report.md, and the plot."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from train.datagen.stats import unread_warning
from train.formatting import format_count
from train.llm.failures import SHOWN_IN_REPORT
from train.llm.judgement import advice_on_replies
from train.llm.reasoning import format_advice
from train.llm.request import Decoding
from train.multifaceted.bench.figures import figures
from train.multifaceted.bench.judging import NO_SCORE, PROMPT_VERSION
from train.multifaceted.bench.protocol import (
    PAPERS_DECODING,
    PAPERS_JUDGE,
    PAPERS_RESPONSES,
    PAPERS_RUNS,
    ROWS_OF_THE_BENCH,
    Protocol,
    decoding_record,
    judge_record,
)
from train.multifaceted.bench.rows import Bench, BenchRow
from train.multifaceted.bench.scoring import WRITE_AGAIN, JudgedRow
from train.reporting.markdown import truncate_middle
from train.reporting.plots import BarSeries, bar_plot
from train.resampling import explain_missing_intervals, missing_interval_reason

HEADING = "## Multifaceted Bench"
_REMEDY = "Use a judge that ends with [RESULT] and a number."
_ASKED_AGAIN = "The same command requests only these again."
_SAMPLES = 3
_MAX_SUBDIMENSIONS = 40
_MAX_SOURCES_IN_PLOT = 20
_SUSPICIOUS_SHARE = 0.5
"""Answers of several sentences, sampled at temperature 1, are hardly ever the same word for word."""


def make_record(
    model: str,
    bench: Bench,
    judged: Sequence[JudgedRow],
    protocol: Protocol,
    *,
    decoding: Decoding | None,
    with_system: bool | None,
    data: Sequence[str],
    respondent: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the record for bench.json. `decoding`, `with_system`: None if the responses come from a file.

    `respondent`: the other values of `protocol.NOTED`.
    """
    averages = figures(judged, protocol, seed=seed)
    return {
        "model": model,
        "data": list(data),
        "rows": len(bench.rows),
        "rows_of_the_data": bench.rows_in_data,
        "fingerprint": fingerprint(bench.rows),
        "complete": not averages["missing"]["judgements_missing"]["pending"],
        "deviations": deviations(bench, protocol, decoding, with_system),
        "judge": judge_record(protocol.judge, PROMPT_VERSION),
        "decoding": None if decoding is None else decoding_record(decoding, PAPERS_RESPONSES),
        "system_message_given": with_system,
        "respondent": None if with_system is None else dict(respondent or {}),
        **averages,
    }


def fingerprint(rows: Sequence[BenchRow]) -> str:
    """Return a checksum of rows, by which `compare` checks that two models got the same questions and rubrics."""
    texts = [
        [row.system, row.prompt, row.reference, [[rubric.criteria, rubric.descriptions] for rubric in row.rubrics]]
        for row in rows
    ]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def deviations(bench: Bench, protocol: Protocol, decoding: Decoding | None, with_system: bool | None) -> list[str]:
    """List the differences from the paper's protocol. The wording of the judge's prompt is always one."""
    settings = protocol.judge
    lines = [f"the judge's prompt has our own wording (version {PROMPT_VERSION})"]
    if settings.show_system:
        lines.append("the judge was shown the system message")
    if settings.model != PAPERS_JUDGE:
        lines.append(f"the judge is {settings.model}; the paper's is {PAPERS_JUDGE}, and scores of two judges differ")
    ours, papers = (decoding_record(decoding, PAPERS_DECODING) for decoding in (settings.decoding, PAPERS_DECODING))
    if ours != papers:
        lines.append(f"the judge answers with {_shown_fields(ours)}; in the paper {_shown_fields(papers)}")
    if settings.runs != PAPERS_RUNS:
        lines.append(f"{format_count(settings.runs, 'run')} of the judge, in the paper {PAPERS_RUNS}")
    if decoding is None:
        lines.append("the responses come from a file: their sampling settings are not known")
    else:
        ours, papers = (decoding_record(settings, PAPERS_RESPONSES) for settings in (decoding, PAPERS_RESPONSES))
        if ours != papers:
            lines.append(f"responses are sampled with {_shown_fields(ours)}; in the paper {_shown_fields(papers)}")
    if with_system is False:
        lines.append("the model got no system message (--no-system)")
    if protocol.best_of > 1:
        lines.append(f"the best of {protocol.best_of} answers to each row counts")
    if len(bench.rows) < bench.rows_in_data:
        lines.append(f"{len(bench.rows):,} of the data's {bench.rows_in_data:,} rows (--limit)")
    if bench.rows_in_data != ROWS_OF_THE_BENCH:
        lines.append(
            f"the data has {format_count(bench.rows_in_data, 'row')}, Multifaceted Bench {ROWS_OF_THE_BENCH:,}"
        )
    return lines


def _shown_fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'not sent' if value is None else value}" for name, value in fields.items())


def markdown(record: Mapping[str, Any], judged: Sequence[JudgedRow], *, batch: bool = False) -> str:
    """Return the section: the settings, the score and its parts, missing scores, and samples.

    `record`: as in bench.json. `batch`: the judge's answers come from files of a batch.
    """
    score, judge, missing = record["score"], record["judge"], record["missing"]
    lines = [HEADING, "", _headline(record), ""]
    lines += [part for warning in warnings(record, batch=batch) for part in (f"**Warning: {warning}**", "")]
    if not record["complete"]:
        pending = missing["judgements_missing"]["pending"]
        are_pending = format_count(pending, "judgement", "is", "are")
        lines += [f"**Not finished: {are_pending} pending; the figures below are without them.**", ""]
    if record["deviations"]:
        lines += ["Deviations from the paper's protocol:", "", *(f"- {line}" for line in record["deviations"]), ""]
    lines += [
        "| | score (95 %) | scored | of |",
        "|---|---|---:|---:|",
        f"| **all rows** | **{_shown(score)}** | {score['scored']:,} | {score['of']:,} |",
        *(f"| source: {_cell(name)} | {_cells(score)} |" for name, score in record["by_source"].items()),
        *(f"| dimension: {_cell(name)} | {_cells(score)} |" for name, score in record["by_dimension"].items()),
    ]
    largest = sorted(record["by_subdimension"], key=lambda name: -record["by_subdimension"][name]["of"])
    shown = sorted(largest[:_MAX_SUBDIMENSIONS])
    lines += [f"| rubric: {_cell(name)} | {_cells(record['by_subdimension'][name])} |" for name in shown]
    lines += [
        "",
        "Counts are rows for `all rows` and sources, rubrics for the other lines.",
        *explain_missing_intervals("\n".join(lines)),
    ]
    if len(largest) > len(shown):
        lines += [f"bench.json has {len(largest) - len(shown):,} more kinds of rubrics."]
    lines += ["", _about_missing(missing), "", *_why_missing(missing), _about_runs(record["runs"], judge["runs"])]
    if best := record.get("best_of"):
        lines += ["", _about_best(best)]
    lines += ["", *(["![bench](bench.png)", ""] if score["mean"] is not None else []), "Samples:", ""]
    for row in judged[:: max(len(judged) // _SAMPLES, 1)][:_SAMPLES]:
        lines += _sample(row)
    return "\n".join(lines) + "\n"


def no_judgement_finished(record: Mapping[str, Any]) -> str:
    """Return an error with advice if the judge refused or left unfinished every judgement; else an empty text.

    Such a run has measured nothing. A judge whose complete answers hold no score is only a warning.
    """
    missing = record["missing"]
    kinds, errors = missing["judgements_missing"], missing["judge_answers_without_score"]
    parts = [f"{kinds[kind]:,} {kind}" for kind in ("refused", "unfinished") if kinds.get(kind)]
    if record["score"]["mean"] is not None or not parts or kinds["unparsable"] or kinds["pending"]:
        return ""
    parts += [f"{kinds['no answer']:,} without an answer"] * bool(kinds["no answer"])
    return (
        f"--judge {record['judge']['model']}: none of the {missing['judgements']:,} judgements has a score: "
        f"{', '.join(parts)}. Its answers: {_counts(errors)}. {advice_on_replies(errors, {NO_SCORE: _REMEDY})}"
    )


def _counts(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in errors.items())


def warnings(record: Mapping[str, Any], *, batch: bool = False) -> list[str]:
    """Return lines on missing answers, on reasoning and control tokens of the judge, and on judges without scores.

    `batch`: the judge's answers come from files of a batch.
    """
    missing = record["missing"]
    errors, kinds = missing["judge_answers_without_score"], missing["judgements_missing"]
    unread = sum(kinds.get(kind, 0) for kind in ("unparsable", "refused", "unfinished"))
    unanswered = sum(missing["why_no_response"].values()) + missing["judgements_missing"]["no answer"]
    missing_answers = [
        f"{format_count(unanswered, 'answer', 'is', 'are')} missing, of model or judge, and not part of any mean "
        f"(reasons: report.md). {WRITE_AGAIN if batch else _ASKED_AGAIN}"
    ]
    cleaned = {f"judge: {event}": count for event, count in missing["judge_answers_cleaned"].items()}
    return (
        missing_answers * bool(unanswered)
        + format_advice(cleaned)
        + unread_warning(
            f"--judge {record['judge']['model']}",
            unread,
            missing["judgements"] - kinds["no answer"] - kinds["pending"],
            f"Reasons: {_counts(errors)}. They are not part of any mean; the answers are in bench_rows.jsonl. "
            + advice_on_replies(errors, {NO_SCORE: _REMEDY}),
        )
    )


def _headline(record: Mapping[str, Any]) -> str:
    score, judge = record["score"], record["judge"]
    mean = "no score" if score["mean"] is None else f"{_shown(score)} of 5"
    text = f"**{record['model']}: {mean}**, judged by {judge['model']}, the mean of "
    text += f"{format_count(len(record['runs']['numbers']), 'run')} over {format_count(score['scored'], 'row')}"
    if record["rows"] < record["rows_of_the_data"]:
        text += f" (the first {record['rows']:,} of {record['rows_of_the_data']:,}: not the complete bench)"
    return text + "."


def _about_missing(missing: Mapping[str, Any]) -> str:
    kinds, errors = missing["judgements_missing"], missing["judge_answers_without_score"]
    text = f"Missing: {sum(kinds.values()):,} of {format_count(missing['judgements'], 'judgement')}"
    if any(kinds.values()):
        text += f" ({_counts({kind: count for kind, count in kinds.items() if count})})"
    text += (
        f"; {sum(errors.values()):,} of {format_count(missing['judge_answers'], 'answer')} of the judge without a score"
    )
    if errors:
        text += f" ({_counts(errors)})"
    text += (
        f". Rows: {missing['rows_without_score']:,} without a score (left out of the means), "
        f"{missing['rows_without_response']:,} of them without a response; "
        f"{missing['rows_with_some_rubrics_missing']:,} scored by some of their rubrics only."
    )
    otherwise = missing["responses_ended_otherwise"]
    if missing["responses_cut"] or missing["responses_empty"] or otherwise:
        text += f" Responses: {missing['responses_cut']:,} cut at the token limit, {missing['responses_empty']:,} empty"
        if unended := missing["responses_only_reasoning"]:
            text += f" ({unended:,} of these: reasoning without an end)"
        text += "".join(f", {count:,} {name}" for name, count in otherwise.items()) + ". They are scored unchanged."
    return text


def _why_missing(missing: Mapping[str, Any]) -> list[str]:
    """List the reasons for missing answers, followed by a blank line."""
    lines = [
        f"- {describe_missing_path}, {format_count(count, 'time')}: {reason}"
        for describe_missing_path, name in (
            ("no response", "why_no_response"),
            ("no answer of the judge", "why_no_judgement"),
        )
        for reason, count in list(missing[name].items())[:SHOWN_IN_REPORT]
    ]
    return [*lines, ""] if lines else []


def _about_runs(runs: Mapping[str, Any], asked: int) -> str:
    scores = ", ".join("none" if score is None else f"{score:.2f}" for score in runs["scores"])
    text = f"The judge's runs: {scores}"
    if runs["std_of_scores"] is not None:
        text += f" (standard deviation {runs['std_of_scores']:.3f})"
    if runs["std_within_a_rubric"] is not None:
        text += (
            f"; within a rubric {runs['std_within_a_rubric']:.2f} on average, and "
            f"{runs['rubrics_in_agreement']:.0%} of {format_count(runs['rubrics_with_two_runs'], 'rubric')} "
            "got the same score in all runs"
        )
    if len(runs["numbers"]) < asked:
        text += ". The first run picked the answers and does not count"
    text += "."
    if (runs["rubrics_with_the_same_words"] or 0) > _SUSPICIOUS_SHARE:
        text += (
            f" **In {runs['rubrics_with_the_same_words']:.0%} of the rubrics the runs agree word for word: the judge's "
            "server seems to decode greedily and to ignore the temperature, so the runs are copies of one run.**"
        )
    return text


def _about_best(best: Mapping[str, Any]) -> str:
    by = {
        "first run": "the judge's first run; the other runs score it",
        "all runs": "the same runs that score it, so the score is an **upper bound**",
        "file": "the scores in the file of responses",
    }.get(best["picked_by"], f"the {best['picked_by']}")
    text = f"Best of {best['answers']}: one answer to each row, picked by {by}."
    if every := best.get("all_answers"):
        text += f" Mean of all answers: {_shown(every)} (run {', '.join(map(str, every['runs']))})."
    if best["fewer_answers"]:
        text += f" {format_count(best['fewer_answers'], 'row', 'has', 'have')} fewer answers."
    return text


def _sample(judged: JudgedRow) -> list[str]:
    scores = ", ".join("none" if score is None else f"{score:.2f}" for score in judged.rubric_scores)
    response = judged.response.response.text if judged.response else None
    judgements = chain(*judged.response.judgements) if judged.response else ()
    texts = [text for judgement in judgements if judgement for text in judgement.texts]
    return [
        f"- row {judged.row.id}: {'no score' if judged.score is None else f'{judged.score:.2f}'} (rubrics: {scores})",
        f"  - system: {_quoted(judged.row.system)}",
        f"  - user: {_quoted(judged.row.prompt)}",
        f"  - answer: {'none' if response is None else _quoted(response)}",
        *([f"  - end of the judgement: {_quoted(texts[0], end=True)}"] if texts else []),
    ]


def _quoted(text: str, *, end: bool = False) -> str:
    """Return the beginning, or the end, of `text` on one line of Markdown."""
    if len(text) > 200:
        text = f"... {text[-200:]}" if end else f"{text[:200]} ..."
    return "`" + text.replace("`", "'").replace("\n", " ⏎ ") + "`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:80]


def _cells(score: Mapping[str, Any]) -> str:
    return f"{_shown(score)} | {score['scored']:,} | {score['of']:,}"


def _shown(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "none"
    if score["low"] is None:
        return f"{score['mean']:.2f} ({missing_interval_reason(score['interval'], score['rows'])})"
    return f"{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def plot_scores(record: Mapping[str, Any], path: Path) -> None:
    """Save a PNG of the scores with their intervals: overall, by source and by dimension."""
    bars: list[tuple[str, Mapping[str, Any]]] = [("all rows", record["score"])]
    bars += [(f"source: {name}", score) for name, score in list(record["by_source"].items())[:_MAX_SOURCES_IN_PLOT]]
    bars += [(f"dimension: {name}", score) for name, score in record["by_dimension"].items()]
    bars = [(name, score) for name, score in bars if score["mean"] is not None]
    names = [truncate_middle(name, 48) for name, _ in bars]
    series = [BarSeries([(score["mean"], score["low"], score["high"]) for _, score in bars])]
    title = truncate_middle(f"Multifaceted Bench: {record['model']}", 90)
    xlabel = truncate_middle(f"score by {record['judge']['model']}", 80) + ", 1 to 5 (95 %)"
    with bar_plot(path, title, xlabel, names, series) as axes:
        axes.set_xlim(1, 5)
