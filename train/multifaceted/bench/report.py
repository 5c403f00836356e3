"""The figures of the bench as a person reads them: the section of report.md, and a plot."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.datagen.drop_reasons import unread_warning
from train.formatting import format_count
from train.llm.failures import SHOWN_IN_REPORT
from train.llm.journal import Decoding
from train.llm.reasoning.answer import format_advice
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
from train.multifaceted.bench.scoring import WRITE_AGAIN, JudgedRow, figures
from train.reporting.markdown import truncate_middle
from train.reporting.plots import error_bars, load_pyplot
from train.resampling import explain_missing_intervals, missing_interval_reason

HEADING = "## Multifaceted Bench"
_ASKED_AGAIN = "The same command asks a server again for these alone."
_SAMPLES = 3
_MOST_SUBDIMENSIONS = 40
_SUSPICIOUS = 0.5
"""Assessments of some sentences, drawn at temperature 1, are hardly ever the same word for word."""


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
    """Return the record for bench.json. `decoding`, `with_system`: None where the responses come from a file.

    `respondent`: the further values of `protocol.NOTED`.
    """
    found = figures(judged, protocol, seed=seed)
    return {
        "model": model,
        "data": list(data),
        "rows": len(bench.rows),
        "rows_of_the_data": bench.of,
        "fingerprint": fingerprint(bench.rows),
        "complete": not found["missing"]["judgements_missing"]["pending"],
        "deviations": deviations(bench, protocol, decoding, with_system),
        "judge": judge_record(protocol.judge, PROMPT_VERSION),
        "decoding": None if decoding is None else decoding_record(decoding, PAPERS_RESPONSES),
        "system_message_given": with_system,
        "respondent": None if with_system is None else dict(respondent or {}),
        **found,
    }


def fingerprint(rows: Sequence[BenchRow]) -> str:
    """Return a checksum of rows, by which `compare` knows that two models were asked and graded alike."""
    told = [
        [row.system, row.prompt, row.reference, [[one.criteria, one.descriptions] for one in row.rubrics]]
        for row in rows
    ]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def deviations(bench: Bench, protocol: Protocol, decoding: Decoding | None, with_system: bool | None) -> list[str]:
    """List the differences from the paper's protocol. The wording of the judge's prompt is always one."""
    settings = protocol.judge
    found = [f"the judge's prompt is in our own words (version {PROMPT_VERSION})"]
    if settings.show_system:
        found.append("the judge was shown the system message")
    if settings.model != PAPERS_JUDGE:
        found.append(f"the judge is {settings.model}; the paper's is {PAPERS_JUDGE}, and scores of two judges differ")
    judges, papers = (decoding_record(one, PAPERS_DECODING) for one in (settings.decoding, PAPERS_DECODING))
    if judges != papers:
        found.append(f"the judge answers with {_words(judges)}; in the paper {_words(papers)}")
    if settings.runs != PAPERS_RUNS:
        found.append(f"{format_count(settings.runs, 'run')} of the judge, in the paper {PAPERS_RUNS}")
    if decoding is None:
        found.append("the responses come from a file: how they were drawn isn't known here")
    else:
        drawn, papers = (decoding_record(one, PAPERS_RESPONSES) for one in (decoding, PAPERS_RESPONSES))
        if drawn != papers:
            found.append(f"responses are drawn with {_words(drawn)}; in the paper {_words(papers)}")
    if with_system is False:
        found.append("no system message was given to the model (--no-system)")
    if protocol.best_of > 1:
        found.append(f"the best of {protocol.best_of} answers to each row counts")
    if len(bench.rows) < bench.of:
        found.append(f"{len(bench.rows):,} of the data's {bench.of:,} rows (--limit)")
    if bench.of != ROWS_OF_THE_BENCH:
        found.append(f"the data has {format_count(bench.of, 'row')}, Multifaceted Bench {ROWS_OF_THE_BENCH:,}")
    return found


def _words(sent: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'not sent' if value is None else value}" for name, value in sent.items())


def markdown(record: Mapping[str, Any], judged: Sequence[JudgedRow], *, batch: bool = False) -> str:
    """Return the section: what was measured and how, the score, its parts, what is missing, and samples.

    `record`: as it stands in bench.json. `batch`: the judge's answers come from files of a batch.
    """
    score, judge, missing = record["score"], record["judge"], record["missing"]
    lines = [HEADING, "", _headline(record), ""]
    lines += [part for warning in warnings(record, batch=batch) for part in (f"**Warning: {warning}**", "")]
    if not record["complete"]:
        pending = missing["judgements_missing"]["pending"]
        to_come = format_count(pending, "judgement", "is", "are")
        lines += [f"**Not finished: {to_come} still to come; what follows is of the rest.**", ""]
    if record["deviations"]:
        lines += ["Not the paper's protocol in this:", "", *(f"- {one}" for one in record["deviations"]), ""]
    lines += [
        "| | score (95 %) | scored | of |",
        "|---|---|---:|---:|",
        f"| **all rows** | **{_shown(score)}** | {score['scored']:,} | {score['of']:,} |",
        *(f"| source: {_cell(name)} | {_line(one)} |" for name, one in record["by_source"].items()),
        *(f"| dimension: {_cell(name)} | {_line(one)} |" for name, one in record["by_dimension"].items()),
    ]
    largest = sorted(record["by_subdimension"], key=lambda name: -record["by_subdimension"][name]["of"])
    shown = sorted(largest[:_MOST_SUBDIMENSIONS])
    lines += [f"| rubric: {_cell(name)} | {_line(record['by_subdimension'][name])} |" for name in shown]
    lines += [
        "",
        "Counts are of rows, and from the dimensions on of rubrics.",
        *explain_missing_intervals("\n".join(lines)),
    ]
    if len(largest) > len(shown):
        lines += [f"Of further kinds of rubrics {len(largest) - len(shown):,} are in bench.json."]
    lines += ["", _about_missing(missing), "", *_why_missing(missing), _about_runs(record["runs"], judge["runs"])]
    if best := record.get("best_of"):
        lines += ["", _about_best(best)]
    lines += ["", *(["![bench](bench.png)", ""] if score["mean"] is not None else []), "Samples:", ""]
    for one in judged[:: max(len(judged) // _SAMPLES, 1)][:_SAMPLES]:
        lines += _sample(one)
    return "\n".join(lines) + "\n"


def no_judgement_finished(record: Mapping[str, Any]) -> str:
    """Return that the judge refused or left unfinished all that it was asked, and what to do; nothing where it did not.

    Such a run has measured nothing. A judge whose complete answers hold no score has been heard, and is a warning.
    """
    missing = record["missing"]
    why, faults = missing["judgements_missing"], missing["judge_answers_without_score"]
    kinds = [f"{why[kind]:,} {kind}" for kind in ("refused", "unfinished") if why.get(kind)]
    if record["score"]["mean"] is not None or not kinds or why["unparsable"] or why["pending"]:
        return ""
    kinds += [f"{why['no answer']:,} without an answer"] * bool(why["no answer"])
    return (
        f"--judge {record['judge']['model']}: none of the {missing['judgements']:,} judgements has a score: "
        f"{', '.join(kinds)}. Its answers: {_counts(faults)}. {_advice_on_judge(faults)}"
    )


def _counts(faults: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in faults.items())


def _advice_on_judge(faults: Mapping[str, int]) -> str:
    """Return what to do about answers of the judge without a score, for each kind of fault."""
    longer = any(name.startswith(("cut", "without an end to")) for name in faults)
    others = [name for name in faults if name.startswith(("ended", "calls", "broken", "without a finish"))]
    advice = {
        "The judge, or a filter of its server, refuses to grade these: use another judge, or turn the filter off.": (
            "refused" in faults
        ),
        "Raise --judge-max-tokens (or max_completion_tokens in --judge-extra).": longer,
        "See in the log of the judge's server why it ends answers like this.": bool(others),
        "Use a judge that ends with [RESULT] and a number.": NO_SCORE in faults,
    }
    return " ".join(sentence for sentence, applies in advice.items() if applies)


def warnings(record: Mapping[str, Any], *, batch: bool = False) -> list[str]:
    """Return lines on missing answers, on reasoning and control tokens of the judge, and on mostly unread scores.

    `batch`: the judge's answers come from files of a batch.
    """
    missing = record["missing"]
    faults, kinds = missing["judge_answers_without_score"], missing["judgements_missing"]
    unread = sum(kinds.get(kind, 0) for kind in ("unparsable", "refused", "unfinished"))
    unanswered = sum(missing["why_no_response"].values()) + missing["judgements_missing"]["no answer"]
    lost = [
        f"{format_count(unanswered, 'answer', 'is', 'are')} missing, of the model or of the judge, and in no mean "
        f"(the reasons are in report.md). {WRITE_AGAIN if batch else _ASKED_AGAIN}"
    ]
    cleaned = {f"judge: {event}": count for event, count in missing["judge_answers_cleaned"].items()}
    return (
        lost * bool(unanswered)
        + format_advice(cleaned)
        + unread_warning(
            f"--judge {record['judge']['model']}",
            unread,
            missing["judgements"] - kinds["no answer"] - kinds["pending"],
            f"Reasons: {_counts(faults)}. They are in no mean; the answers are in bench_rows.jsonl. "
            + _advice_on_judge(faults),
        )
    )


def _headline(record: Mapping[str, Any]) -> str:
    score, judge = record["score"], record["judge"]
    mean = "no score" if score["mean"] is None else f"{_shown(score)} of 5"
    text = f"**{record['model']}: {mean}**, judged by {judge['model']}, the mean of "
    text += f"{format_count(len(record['runs']['numbers']), 'run')} over {format_count(score['scored'], 'row')}"
    if record["rows"] < record["rows_of_the_data"]:
        text += f" (the first {record['rows']:,} of {record['rows_of_the_data']:,}: not the whole bench)"
    return text + "."


def _about_missing(missing: Mapping[str, Any]) -> str:
    why = missing["judgements_missing"]
    faults = missing["judge_answers_without_score"]
    text = f"Missing: {sum(why.values()):,} of {format_count(missing['judgements'], 'judgement')}"
    if any(why.values()):
        text += f" ({', '.join(f'{count:,} {name}' for name, count in why.items() if count)})"
    text += (
        f"; {sum(faults.values()):,} of {format_count(missing['judge_answers'], 'answer')} of the judge held no score"
    )
    if faults:
        text += f" ({', '.join(f'{count:,} {name}' for name, count in faults.items())})"
    text += (
        f". Rows: {missing['rows_without_score']:,} without a score (left out of the means), of them "
        f"{missing['rows_without_response']:,} without a response; {missing['rows_with_some_rubrics_missing']:,} "
        "scored by some of their rubrics only."
    )
    otherwise = missing["responses_ended_otherwise"]
    if missing["responses_cut"] or missing["responses_empty"] or otherwise:
        text += f" Responses: {missing['responses_cut']:,} cut at the token limit, {missing['responses_empty']:,} empty"
        if unended := missing["responses_only_reasoning"]:
            text += f" ({unended:,} of these as their reasoning had no end)"
        text += "".join(f", {count:,} {name}" for name, count in otherwise.items()) + ". They are scored as they are."
    return text


def _why_missing(missing: Mapping[str, Any]) -> list[str]:
    """A line for each reason why something got no answer, and a blank one behind them."""
    lines = [
        f"- {what}, {format_count(count, 'time')}: {reason}"
        for what, name in (("no response", "why_no_response"), ("no answer of the judge", "why_no_judgement"))
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
            "got one grade in all runs"
        )
    if len(runs["numbers"]) < asked:
        text += ". The first run picked the answers, and doesn't count"
    text += "."
    if (runs["rubrics_with_the_same_words"] or 0) > _SUSPICIOUS:
        text += (
            f" **In {runs['rubrics_with_the_same_words']:.0%} of the rubrics the runs agree word for word: the judge's "
            "server seems to decode greedily whatever temperature it is sent, so the runs are one and the same.**"
        )
    return text


def _about_best(best: Mapping[str, Any]) -> str:
    by = {
        "first run": "the judge's first run; the other runs score it",
        "all runs": "the very runs that score it, which makes the score an **upper bound**",
        "file": "the scores given with the responses",
    }[best["picked_by"]]
    text = f"Best of {best['answers']}: one answer of each row, picked by {by}."
    if every := best.get("all_answers"):
        text += f" All answers have {_shown(every)} on average (run {', '.join(map(str, every['runs']))})."
    if best["fewer_answers"]:
        text += f" {format_count(best['fewer_answers'], 'row', 'has', 'have')} fewer answers."
    return text


def _sample(one: JudgedRow) -> list[str]:
    scores = ", ".join("none" if score is None else f"{score:.2f}" for score in one.rubric_scores)
    response = one.answer.response.text if one.answer else None
    said = [text for runs in (one.answer.judgements if one.answer else ()) for run in runs if run for text in run.texts]
    return [
        f"- row {one.row.id}: {'no score' if one.score is None else f'{one.score:.2f}'} (rubrics: {scores})",
        f"  - system: {_quoted(one.row.system)}",
        f"  - user: {_quoted(one.row.prompt)}",
        f"  - answer: {'none' if response is None else _quoted(response)}",
        *([f"  - the judge ends: {_quoted(said[0], end=True)}"] if said else []),
    ]


def _quoted(text: str, *, end: bool = False) -> str:
    """`text` on one line of Markdown, its beginning or its end."""
    if len(text) > 200:
        text = f"... {text[-200:]}" if end else f"{text[:200]} ..."
    return "`" + text.replace("`", "'").replace("\n", " ⏎ ") + "`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:80]


def _line(one: Mapping[str, Any]) -> str:
    return f"{_shown(one)} | {one['scored']:,} | {one['of']:,}"


def _shown(one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return "none"
    if one["low"] is None:
        return f"{one['mean']:.2f} ({missing_interval_reason(one['interval'], one['rows'])})"
    return f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The scores with their intervals, overall, by source and by dimension, as a PNG."""
    pyplot = load_pyplot()
    bars: list[tuple[str, Mapping[str, Any]]] = [("all rows", record["score"])]
    bars += [(f"source: {name}", one) for name, one in list(record["by_source"].items())[:20]]
    bars += [(f"dimension: {name}", one) for name, one in record["by_dimension"].items()]
    bars = [(name, one) for name, one in bars if one["mean"] is not None]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(bars) + 1.4), dpi=100, layout="constrained")
    means = [one["mean"] for _, one in bars]
    ends = error_bars((one["mean"], one["low"], one["high"]) for _, one in bars)
    axes.barh(range(len(bars)), means, 0.7, xerr=ends, color="tab:blue", capsize=2)
    axes.set_yticks(range(len(bars)), [truncate_middle(name, 48) for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(1, 5)
    axes.set_xlabel(truncate_middle(f"score by {record['judge']['model']}", 80) + ", 1 to 5 (95 %)")
    figure.suptitle(truncate_middle(f"Multifaceted Bench: {record['model']}", 90), fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)
