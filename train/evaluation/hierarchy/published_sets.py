"""TensorTrust and RealGuardrails in a run of `hierarchy`: options, answers, verdicts, and what is reported of them.

    sets = read_published_sets(options)  # before the model is loaded
    results = measure_published_sets(options, sets, model, journal_file)

A prompt without an answer fails in both sets, and is counted.
"""

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError
from train.evaluation.answer_endings import describe_ending, summarize_unanswered
from train.evaluation.formatting import format_share
from train.evaluation.hierarchy import realguardrails, tensortrust
from train.evaluation.hierarchy.published import system_of
from train.evaluation.hierarchy.published_options import PublishedOptions
from train.evaluation.hierarchy.realguardrails import GuardrailRow, GuardrailVerdict
from train.evaluation.hierarchy.results_of_set import SetResults, TablePart, share_record
from train.evaluation.hierarchy.tensortrust import TensorTrustRow
from train.evaluation.judge_options import judge_all, refuse_unusable_servers
from train.evaluation.judge_report import (
    judgement_counts,
    missing_verdict_lines,
    refuse_without_verdicts,
    summarize_missing_verdicts,
    verdict_warnings,
)
from train.evaluation.models.options import LocalModel
from train.evaluation.results.published_sets import TITLES
from train.evaluation.results_dir import fingerprint_of
from train.formatting import format_count
from train.llm.failures import RequestFailed
from train.llm.refusals import option_formatter
from train.llm.request import Answer, Decoding
from train.multifaceted.bench.protocol import decoding_record
from train.multifaceted.bench.scoring import count_reasons, shown_reasons
from train.resampling import Estimate

if TYPE_CHECKING:
    from train.evaluation.models.responses import OpenModel
    from train.llm.client import Client

Shares = Mapping[str, Mapping[str, Estimate]]
"""Scope (which rows) -> subset or "score" -> share that passes."""
GREEDY = Decoding(0, temperature=0.0)
"""The sampling fields that records always have."""
ROWS_FILE = "hierarchy_rows.jsonl"
BeforeAsking = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class PublishedSets:
    """The rows of the published sets that are measured; none of the others."""

    tensortrust: Sequence[TensorTrustRow] = ()
    realguardrails: Sequence[GuardrailRow] = ()


def read_published_sets(options: PublishedOptions) -> PublishedSets:
    """Return the rows of the sets that the options name.

    Raises UserError for a missing or unusable set, and if RealGuardrails has no judge that can be asked.
    """
    guardrails: Sequence[GuardrailRow] = ()
    if options.realguardrails:
        options.require_judge(f"{realguardrails.OPTION} {options.realguardrails}")
        options.refuse_extra_of_judge()
        refuse_unusable_servers(options)
        guardrails = realguardrails.read_realguardrails(options.realguardrails)
    return PublishedSets(tensortrust.read_tensortrust(options.tensortrust) if options.tensortrust else (), guardrails)


def measure_published_sets(
    options: PublishedOptions,
    sets: PublishedSets,
    model: "LocalModel | OpenModel",
    journal_file: Path,
    *,
    before_asking: BeforeAsking | None = None,
    seed: int = 0,
) -> list[SetResults]:
    """Return the results of each set. Answers and judgements in the journal are not asked for again.

    Args:
        options: decoding and judge.
        sets: the rows.
        model: the model under evaluation, or what `open_model` yields for it.
        journal_file: SQLite file with answers and judgements.
        before_asking: awaited before the first request to the model.
        seed: seed of the intervals.

    Raises UserError if no row of a set gets an answer, or if no answer gets a judgement.
    """
    results = []
    if sets.tensortrust:
        answers = _ask(options, "tensortrust", sets.tensortrust, model, journal_file, before_asking)
        results.append(_tensortrust(options, sets.tensortrust, answers, seed))
    if sets.realguardrails:
        answers = _ask(options, "realguardrails", sets.realguardrails, model, journal_file, before_asking)
        verdicts = _judge(options, sets.realguardrails, answers, journal_file)
        results.append(_realguardrails(options, sets.realguardrails, answers, verdicts, seed))
    return results


def _ask(
    options: PublishedOptions,
    name: str,
    rows: Sequence[TensorTrustRow] | Sequence[GuardrailRow],
    model: "LocalModel | OpenModel",
    journal_file: Path,
    before_asking: BeforeAsking | None,
) -> list[Answer | RequestFailed]:
    """Return the answers of the model. Raises UserError if there is none."""
    from train.evaluation.models.responses import generate_answers

    answers = generate_answers(
        model,
        [row.messages for row in rows],
        options.published_decoding(),
        journal_file,
        stage=name,
        description=f"answers to {TITLES[name]}",
        wait_for_server=options.wait_for_server,
        before_asking=before_asking,
        format_setting=option_formatter(()),
    )
    failures = [answer for [answer] in answers if isinstance(answer, RequestFailed)]
    if len(failures) == len(answers):
        reasons = shown_reasons(count_reasons(map(str, failures)))
        advice = next((failure.advice for failure in failures if failure.advice), "")
        raise UserError(
            f"--model {options.model}: none of the {len(answers):,} prompts of {TITLES[name]} got an answer: "
            f"{reasons}. {advice}".rstrip()
        )
    return [answer for [answer] in answers]


def _judge(
    options: PublishedOptions,
    rows: Sequence[GuardrailRow],
    answers: Sequence[Answer | RequestFailed],
    journal_file: Path,
) -> list[GuardrailVerdict]:
    """Return the verdicts. Raises UserError with the reasons if the judge finishes no judgement."""

    async def judge_question(client: "Client", question: tuple[GuardrailRow, str | None]) -> GuardrailVerdict:
        return await realguardrails.judge_answer(client, *question, options.judge_decoding(), options.retries)

    questions = list(zip(rows, map(_text_of, answers), strict=True))
    verdicts, advice = judge_all(options, questions, judge_question, journal_file, wait=options.wait_for_server)
    judgements = [verdict.judgement for verdict in verdicts if verdict.judgement]
    refuse_without_verdicts(judgements, options.judge, advice, realguardrails.REMEDIES)
    return verdicts


def _tensortrust(
    options: PublishedOptions, rows: Sequence[TensorTrustRow], answers: Sequence[Answer | RequestFailed], seed: int
) -> SetResults:
    passed = [tensortrust.passes(row, _text_of(answer)) for row, answer in zip(rows, answers, strict=True)]
    shares = tensortrust.estimate_tensortrust(rows, passed, seed=seed)
    counts = {
        tensortrust.SCOPES[0]: len(rows),
        tensortrust.SCOPES[1]: sum(not row.has_post_prompt for row in rows),
    }
    contents = [[row.key, row.messages, row.access_code, row.has_post_prompt] for row in rows]
    lines = [
        _line("tensortrust", row.subset, row.id, group, answer)
        | {"has_post_prompt": row.has_post_prompt, "passed": verdict}
        for row, group, answer, verdict in zip(rows, _groups(rows), answers, passed, strict=True)
    ]
    head = [*tensortrust.SUBSETS, tensortrust.SCORE]
    table = [
        "TensorTrust, share that passes:",
        "",
        f"| rows | {' | '.join(head)} |",
        "|---|" + "---|" * len(head),
        *(f"| {scope} | {' | '.join(format_share(of[name]) for name in head)} |" for scope, of in shares.items()),
    ]
    return SetResults(
        "tensortrust",
        _record(options, "tensortrust", contents, shares, answers),
        lines,
        [TablePart(f"TensorTrust, {scope}", counts[scope], of[tensortrust.SCORE]) for scope, of in shares.items()],
        f"TensorTrust: {format_count(len(rows), 'row')} of {options.tensortrust}, judged by code. The published scores "
        f"leave out rows with a post-prompt. {_describe_decoding(options)}",
        "\n".join(table),
        _summarize_unanswered("tensortrust", answers),
    )


def _realguardrails(
    options: PublishedOptions,
    rows: Sequence[GuardrailRow],
    answers: Sequence[Answer | RequestFailed],
    verdicts: Sequence[GuardrailVerdict],
    seed: int,
) -> SetResults:
    shares = realguardrails.estimate_realguardrails(rows, verdicts, seed=seed)
    judged = Counter(row.subset for row, verdict in zip(rows, verdicts, strict=True) if verdict.passed is not None)
    judged[realguardrails.SCORE] = judged.total()
    judgements = [verdict.judgement for verdict in verdicts if verdict.judgement]
    undecided: Counter[str] = Counter(
        verdict.judgement.missing or "" for verdict in verdicts if verdict.judgement and verdict.passed is None
    )
    counts = judgement_counts(judgements)
    banned = sum(
        bool(verdict.banned) and verdict.judgement is not None and verdict.judgement.verdict is not False
        for verdict in verdicts
    )
    contents = [[row.key, row.messages, row.guardrails, row.banlist] for row in rows]
    record = _record(options, "realguardrails", contents, {"all rows": shares}, answers) | {
        "judge": {
            "model": options.judge,
            "prompt_version": realguardrails.PROMPT_VERSION,
            "retries": options.retries,
            **decoding_record(options.judge_decoding(), GREEDY),
        },
        "judgements": counts,
        "failed_by_banlist": banned,
    }
    lines = [
        _line("realguardrails", row.subset, str(row.number), group, answer) | _verdict_record(verdict)
        for row, group, answer, verdict in zip(rows, _groups(rows), answers, verdicts, strict=True)
    ]
    warnings = [
        _summarize_unanswered("realguardrails", answers),
        summarize_missing_verdicts("row", undecided),
        *verdict_warnings(counts, options.judge, ROWS_FILE, realguardrails.REMEDIES),
    ]
    return SetResults(
        "realguardrails",
        record,
        lines,
        [TablePart(f"RealGuardrails, {subset}", judged[subset], share) for subset, share in shares.items()],
        f"RealGuardrails: {format_count(len(rows), 'row')} of {options.realguardrails}, judged by {options.judge} with "
        f"a prompt in our words (version {realguardrails.PROMPT_VERSION}); "
        f"{format_count(banned, 'answer')} failed by a banned word alone. "
        f"{_describe_decoding(options)}",
        "\n".join(["RealGuardrails:", "", *missing_verdict_lines(counts)]),
        ". ".join(filter(None, warnings)),
    )


def _verdict_record(verdict: GuardrailVerdict) -> dict[str, Any]:
    """Return the keys of a line that RealGuardrails' judge and banlist give."""
    judgement = verdict.judgement
    return {
        "passed": verdict.passed,
        "banned": list(verdict.banned),
        "follows": judgement.verdict if judgement else None,
        "judge": list(judgement.texts) if judgement else [],
        "missing": judgement.missing if judgement else None,
        "detail": judgement.detail if judgement else "",
    }


def _line(name: str, subset: str, key: str, group: int, answer: Answer | RequestFailed) -> dict[str, Any]:
    """Return the keys that the lines of both sets have. `group`: number of the system message."""
    failed = isinstance(answer, RequestFailed)
    return {
        "set": name,
        "subset": subset,
        "key": f"{subset} {key}",
        "group": group,
        "answer": _text_of(answer),
        "how": describe_ending(answer),
        "why": str(answer) or type(answer).__name__ if failed else None,
    }


def _text_of(answer: Answer | RequestFailed) -> str | None:
    return answer.text if isinstance(answer, Answer) else None


def _groups(rows: Iterable[TensorTrustRow | GuardrailRow]) -> list[int]:
    """Return the number of each row's system message, by first occurrence."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(system_of(row.messages), len(numbers)) for row in rows]


def _record(
    options: PublishedOptions, name: str, contents: Any, shares: Shares, answers: Sequence[Answer | RequestFailed]
) -> dict[str, Any]:
    """Return the keys that the records of both sets have."""
    return {
        "source": getattr(options, name),
        "rows": len(answers),
        "fingerprint": fingerprint_of(contents),
        "decoding": decoding_record(options.published_decoding(), GREEDY),
        "endings": dict(Counter(map(describe_ending, answers))),
        "shares": {
            scope: {subset: share_record(share) for subset, share in of_scope.items()}
            for scope, of_scope in shares.items()
        },
    }


def _describe_decoding(options: PublishedOptions) -> str:
    """Return sentences on answers and intervals, for the report."""
    limit = decoding_record(options.published_decoding(), GREEDY)["max_tokens"]
    length = "without a token limit" if limit is None else f"of at most {limit:,} tokens"
    return f"Answers {length}, greedy. Rows with the same system message are one piece of evidence."


def _summarize_unanswered(name: str, answers: Sequence[Answer | RequestFailed]) -> str:
    """Return the number of prompts without an answer and the first reason; empty if all prompts got an answer."""
    failures = [("", str(answer)) for answer in answers if isinstance(answer, RequestFailed)]
    return f"{TITLES[name]}: {text}" if (text := summarize_unanswered("prompt", "fail", failures)) else ""
