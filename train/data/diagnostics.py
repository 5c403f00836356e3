"""Diagnostics of the data: errors that stop a run, rows that are not trained, unread columns, warnings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import yaml

from train.data.chat.assistant_spans import NO_TOOLS
from train.data.chat.rendering import REASONING_LOST
from train.data.prepared_data import PreparedData, UnreadText
from train.data.sources.source import BadRow, BadRows
from train.errors import UserError
from train.formatting import format_count
from train.recipe import DataSection, Recipe, Source
from train.recipe.conflicts import key_of_other_loss

_NAMES_SHOWN = 12
_FORMAT_ERRORS = {"missing column", "wrong type", "unknown role", "empty content", "no assistant turn"}
"""Kinds of errors that all rows have when they are read in the wrong format."""


@dataclass(frozen=True)
class DroppedRows:
    """Rows that are not trained, or not in full, for one reason; `examples` are the first three.

    `outcome`: refused (the run won't start), skipped, left out (by `min_gain`, or without a sibling), dropped or
    truncated.
    """

    outcome: str
    reason: str
    rows: int
    examples: list[BadRow]


def find_dropped_rows(data: PreparedData, section: DataSection) -> list[DroppedRows]:
    """Return every group of rows that are not trained in full, the largest first."""
    outcome = "refused" if section.on_bad_row == "error" else "skipped"
    groups = [DroppedRows(outcome, kind, rows.count, rows.examples) for kind, rows in data.errors.items()]
    for gain_filter in data.gain_filters:
        rows, reason = gain_filter.left_out, f"left out of {gain_filter.rows:,} by {gain_filter.key}"
        if rows.count:
            groups.append(DroppedRows("left out", reason, rows.count, rows.examples))
    for source in data.left_out:
        for reason, rows in source.reasons.items():
            groups.append(DroppedRows("left out", f"{reason} ({source.key})", rows.count, rows.examples))
    for name, stats in data.stats.items():
        for outcome, rows in stats.overlong.items():
            part = f"{name} pairs with a half" if stats.pairs else f"{name},"
            reason = f"{part} over {section.max_length:,} tokens"
            groups.append(DroppedRows(outcome, reason, rows.count, rows.examples))
        if (same := stats.same_when_cut).count:
            reason = f"{name} pairs whose halves are the same within {section.max_length:,} tokens"
            groups.append(DroppedRows("dropped", reason, same.count, same.examples))
    return sorted(groups, key=lambda group: -group.rows)


def describe_dropped(dropped: DroppedRows) -> str:
    """Return a line with the number of these rows, the reason and the first row."""
    # "1 row refused by the template", not "1 row refused, refused by the template"
    reason = dropped.reason
    if not reason.startswith(f"{dropped.outcome} "):
        reason = f"{dropped.outcome}, {reason}"
    return f"{format_count(dropped.rows, 'row')} {reason}: first {dropped.examples[0]}"


def describe_unread(unread: Sequence[UnreadText]) -> list[str]:
    """Return a line for each source with columns or message keys that no format reads, lost content first."""
    lines = []
    for key, texts in groupby(unread, lambda text: text.key):
        of_source = sorted(texts, key=lambda text: (not text.losing or text.ignored, -text.rows, text.name))
        names = [_describe_unread(text) for text in of_source[:_NAMES_SHOWN]]
        more = [f"and {len(of_source) - _NAMES_SHOWN:,} others"] if len(of_source) > _NAMES_SHOWN else []
        lines.append(f"{key}: {', '.join([*names, *more])}")
    return lines


def _describe_unread(text: UnreadText) -> str:
    column, dot, key = text.name.rpartition(".")
    name = text.name if key.strip() else f'{column}{dot}"{key}"'  # pandas' index has no name
    if text.ignored:
        return f"{name} (ignored, {format_count(text.rows, 'row')})"
    return f"{name} ({format_count(text.rows, 'row')}" + (f", content in {text.losing:,})" if text.losing else ")")


def find_data_warnings(data: PreparedData) -> list[str]:
    """Return what the user should know of the data, though it doesn't stop the run."""
    warnings = [*data.unused_ignores]
    for gain_filter in data.gain_filters:
        if not gain_filter.left_out.count:
            warnings.append(f"{gain_filter.key} leaves out none of {format_count(gain_filter.rows, 'row')}")
        if gain_filter.unmeasured:
            warnings.append(
                f"{gain_filter.key}: {gain_filter.unmeasured:,} of {format_count(gain_filter.rows, 'row')} are not in "
                f"{gain_filter.file} and stay"
            )
    if data.skipped_files:
        warnings.append(
            f"{format_count(len(data.skipped_files), 'file', 'was', 'were')} skipped (the name begins with _ or has no "
            f"known file extension): {_first_three(data.skipped_files)}"
        )
    if data.metadata_files:
        warnings.append(
            f"{format_count(len(data.metadata_files), 'file', 'was', 'were')} skipped (metadata without rows): "
            f"{_first_three(data.metadata_files)}"
        )
    if data.escaped:
        warnings.append(
            f"{format_count(data.escaped, 'row', 'has', 'have')} control tokens typed in the text, which a zero-width "
            "space breaks up (chat.control_tokens_in_text: escape)"
        )
    for name, stats in data.stats.items():
        if stats.duplicates.example:
            first, second = stats.duplicates.example
            unit = f"{name} {stats.unit}"
            warnings.append(
                f"{format_count(stats.duplicates.rows, unit, 'is an exact duplicate', 'are exact duplicates')}"
                f" of another: {second} is the same as {first}"
            )
        if stats.pairs and stats.pairs.contradictory.example:
            first, second = stats.pairs.contradictory.example
            warnings.append(
                f"{format_count(stats.pairs.contradictory.rows, f'{name} pair', 'contradicts', 'contradict')} another: "
                f"under the same prompt {second} prefers the answer that {first} rejects, and the reverse"
            )
    conversations, questions = data.overlap.conversations, data.overlap.questions
    unit = f"validation {data.train.stats.unit}"
    if conversations.example:
        warnings.append(
            f"{format_count(conversations.rows, unit, 'is', 'are')} also in training, so the validation "
            f"loss is too low: {conversations.example[1]} is the same as {conversations.example[0]}"
        )
    if questions.example and questions.rows > conversations.rows:
        verbs, part = (("has", "have"), "an") if data.train.stats.pairs else (("begins", "begin"), "with a")
        what = "instruction" if data.train.stats.pairs else "user message"
        warnings.append(
            f"{format_count(questions.rows, unit, *verbs)} {part} {what} that is also in training: "
            f"{questions.example[1]} and {questions.example[0]}"
        )
    return warnings


def _first_three(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def describe_loss_weights(data: PreparedData, section: DataSection) -> list[str]:
    """Return a line for each split and each source that has loss weights other than 1."""
    lines = [
        f"{stats.rows_with_loss_weight:,} of {format_count(stats.rows, f'{name} {stats.unit}')} have a loss weight "
        "other than 1"
        for name, stats in data.stats.items()
        if stats.rows_with_loss_weight
    ]
    for key, sources in (("data.sources", section.sources), ("data.validation", section.validation)):
        for number, source in enumerate(sources if isinstance(sources, tuple) else ()):
            if source.loss_weight != 1:
                lines.append(f"{key}.{number}.loss_weight: {source.loss_weight:g} ({source.path})")
    return lines


def find_data_error(data: PreparedData, recipe: Recipe) -> str | None:
    """Return why a recipe refuses these rows and what to change, all in one paragraph; None if it trains them."""
    section = recipe.data
    losing = (text for text in data.unread if text.losing and not text.ignored)
    lost_texts = [_describe_lost(key, list(texts)) for key, texts in groupby(losing, lambda text: text.key)]
    reasons = []
    if data.errors and section.on_bad_row == "error":
        remedy = _remedy(data.errors, "Correct them")
        reasons.append(
            f"rows that can't be trained: {_list_errors(data.errors)}. {remedy}, or skip them with `data.on_bad_row: "
            "skip` (the start screen counts them)."
        )
    for name, stats in data.stats.items():
        if refused := stats.overlong.get("refused"):
            what = "pairs have a half with" if stats.pairs else "rows have"
            reasons.append(
                f"{refused.count:,} {name} {what} more tokens than data.max_length ({section.max_length:,}); the "
                f"longest has {stats.longest:,} ({stats.longest_place}). Write a larger max_length, or say what "
                "happens to them: `data.overlong: drop` or `data.overlong: truncate`."
            )
        if not stats.rows:
            overlong = sum(rows.count for rows in stats.overlong.values()) + stats.same_when_cut.count
            reasons.append(
                f"no {name} {stats.unit} remains of {stats.conversations:,}: {overlong:,} are longer than "
                f"data.max_length ({section.max_length:,}); the longest has {stats.longest:,} tokens."
            )
    weights = describe_loss_weights(data, section)
    if weights and recipe.preference:
        reasons.append(f"{weights[0]}, and the losses of pairs have no weights. Remove them.")
    elif weights and (key := key_of_other_loss(recipe.training)):
        reasons.append(
            f"{weights[0]}, and TRL computes the loss of {key} without weights. Remove that key or the weights."
        )
    rows = [f"data: {' '.join(reasons)}"] if reasons else []
    return " ".join([*lost_texts, *data.misspelled_ignores, *rows]) or None


def no_usable_row(key: str, source: Source, errors: Mapping[str, BadRows]) -> UserError:
    """Return the error for a source of which no row can be trained. `errors`: those of all sources."""
    wrong_format = errors.keys() <= _FORMAT_ERRORS
    remedy = _remedy(errors, f"Is `{key}.format` the right one?" if wrong_format else "Correct them")
    end = "" if remedy.endswith("?") else "."
    return UserError(
        f"{key}: no row of {source.path} can be trained. Errors of all sources: {_list_errors(errors)}. {remedy}{end}"
    )


def _describe_lost(key: str, texts: Sequence[UnreadText]) -> str:
    """Return the error for content of a source that no format reads."""
    columns = "; ".join(f"`{text.name}` in {format_count(text.losing, 'row')}, first {text.example}" for text in texts)
    names = yaml.safe_dump([text.name for text in texts], default_flow_style=True, allow_unicode=True, width=math.inf)
    return (
        f"{key}: text that is not read, so the model would be trained without it: {columns}. Rename it to what is read "
        f"(recipes/README.md lists it), or leave it out with `{key}.ignore: {names.strip()}`."
    )


def _list_errors(errors: Mapping[str, BadRows]) -> str:
    kinds = sorted(errors.items(), key=lambda item: -item[1].count)
    return "; ".join(f"{rows.count:,} {kind}: {' | '.join(map(str, rows.examples))}" for kind, rows in kinds)


def _remedy(errors: Mapping[str, BadRows], default: str) -> str:
    """Return advice for rows with these errors: `default`, or the template that they need."""
    if REASONING_LOST in errors:
        return (
            "Choose a `chat.template` that writes reasoning, or leave it out with "
            f"`ignore: ['messages[].thinking']` under the source, by the name that it has there. {default}"
        )
    if NO_TOOLS not in errors:
        return default
    template = (
        "Write `chat.template: chatml-tools`, where the tokenizer has <|im_start|> and <|im_end|>, or the path of a "
        "template that writes tools and their calls"
    )
    return template if len(errors) == 1 else f"{template}. For the rest: {default[0].lower()}{default[1:]}"
