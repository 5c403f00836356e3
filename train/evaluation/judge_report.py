"""Missing verdicts of a judge: counts for JSON, lines of a report, warnings, and the error of a run without any."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from train.errors import UserError
from train.formatting import format_count
from train.llm.failures import count_reasons, shown_reasons
from train.llm.judgement import Judgement, advice_on_replies
from train.llm.reasoning import format_advice


def judgement_counts(judgements: Sequence[Judgement[Any]]) -> dict[str, Any]:
    """Return counts for JSON: judgements, missing ones by kind, reasons, replies without a verdict, tokens."""
    kinds = Counter(judgement.missing for judgement in judgements if judgement.missing)
    errors = Counter(error for judgement in judgements for error in judgement.errors)
    cleaned = Counter(event for judgement in judgements for event in judgement.cleaned)
    return {
        "judgements": len(judgements),
        "missing": {kind: kinds[kind] for kind in ("unparsable", "refused", "unfinished", "no answer") if kinds[kind]},
        "why_no_answer": count_reasons(part.detail for part in judgements if part.missing == "no answer"),
        "replies": sum(len(judgement.texts) for judgement in judgements),
        "replies_without_verdict": dict(sorted(errors.items())),
        "replies_cleaned": dict(sorted(cleaned.items())),
        "tokens": {name: sum(part.tokens.get(name, 0) for part in judgements) for name in ("prompt", "completion")},
    }


def refuse_without_verdicts(
    judgements: Sequence[Judgement[Any]], judge: str | None, advice: str, remedies: Mapping[str, str]
) -> None:
    """Raise UserError with the reasons if the judge finished no judgement: nothing was measured.

    A judge whose replies are complete and hold no verdict is only a warning.

    Args:
        judgements: all judgements.
        judge: the judge's name.
        advice: the option to change if requests were refused, as a sentence.
        remedies: as of `advice_on_replies`.
    """
    if not judgements or any(each.verdict is not None or each.missing == "unparsable" for each in judgements):
        return
    reasons = shown_reasons(count_reasons(each.detail for each in judgements))
    errors = {error for each in judgements for error in each.errors}
    raise UserError(
        f"--judge {judge}: none of the {len(judgements):,} judgements has a verdict: {reasons}. "
        f"{' '.join(filter(None, (advice, advice_on_replies(errors, remedies))))} "
        "The answers of the model are kept, and the same command continues from there."
    )


def missing_verdict_lines(counts: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the missing judgements of `judgement_counts`, and a line for each reason."""
    missing = counts["missing"]
    text = f"Judgements missing: {sum(missing.values()):,} of {counts['judgements']:,}"
    text += f" ({_listed(missing)})" if missing else ""
    errors = counts["replies_without_verdict"]
    text += f"; {sum(errors.values()):,} of {format_count(counts['replies'], 'answer')} of the judge without a verdict"
    text += f" ({_listed(errors)})." if errors else "."
    reasons = list(counts["why_no_answer"].items())[:5]
    return [text, *(f"- no answer of the judge, {format_count(times, 'time')}: {why}" for why, times in reasons)]


def summarize_missing_verdicts(
    noun: str, of_judge: Mapping[str, int], of_model: Mapping[str, int] | None = None
) -> str:
    """Return `2 rows have no verdict and are left out: 1 refused, 1 unparsable`; empty if none is missing.

    `of_judge`: the number of missing judgements by kind; `of_model`: that of answers that nobody could judge.
    """
    kinds = dict(of_model or {})
    kinds |= {f"{kind} of the judge" if kind == "no answer" else kind: count for kind, count in of_judge.items()}
    count, verbs = sum(kinds.values()), ("has no verdict and is left out", "have no verdict and are left out")
    return f"{format_count(count, noun, *verbs)}: {_listed(kinds)}" if count else ""


def verdict_warnings(counts: Mapping[str, Any], judge: str | None, rows: str, remedies: Mapping[str, str]) -> list[str]:
    """Return warnings on reasoning of the judge that was removed, and on a judge without verdicts.

    `rows`: the file with the replies.
    """
    from train.datagen.stats import unread_warning  # which imports the client

    errors, missing = counts["replies_without_verdict"], counts["missing"]
    unread = sum(missing.get(kind, 0) for kind in ("unparsable", "refused", "unfinished"))
    return [
        *format_advice({f"judge: {event}": times for event, times in counts["replies_cleaned"].items()}),
        *unread_warning(
            f"--judge {judge}",
            unread,
            counts["judgements"] - missing.get("no answer", 0),
            f"Reasons: {_listed(errors)}. They are not part of any mean; the replies are in {rows}. "
            + advice_on_replies(errors, remedies),
        ),
    ]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
