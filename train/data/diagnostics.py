"""What became of rows that are not trained as they stand, and what else a person should know of the data, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from train.data.prepare import Prepared, UnreadText
from train.data.sources.source import BadRow
from train.formatting import format_count
from train.recipe import DataSection

_NAMES_SHOWN = 12


@dataclass(frozen=True)
class DroppedRows:
    """Rows that are not trained as they stand, for one reason, with the first three of them.

    `outcome`: refused (the run won't start), skipped, dropped or truncated.
    """

    outcome: str
    reason: str
    rows: int
    examples: list[BadRow]


def find_dropped_rows(data: Prepared, section: DataSection) -> list[DroppedRows]:
    """Every kind of row that is not trained as it stands, the most frequent first."""
    bad = "refused" if section.on_bad_row == "error" else "skipped"
    found = [DroppedRows(bad, kind, rows.count, rows.examples) for kind, rows in data.errors.items()]
    for name, stats in data.stats.items():
        for became, rows in stats.overlong.items():
            reason = f"{name}, over {section.max_length:,} tokens"
            found.append(DroppedRows(became, reason, rows.count, rows.examples))
    return sorted(found, key=lambda one: -one.rows)


def describe_dropped(one: DroppedRows) -> str:
    """How many rows are not trained as they stand, why, and where the first is."""
    # "1 row refused by the template", not "1 row refused, refused by the template"
    why = one.reason if one.reason.startswith(f"{one.outcome} ") else f"{one.outcome}, {one.reason}"
    return f"{format_count(one.rows, 'row')} {why}: first {one.examples[0]}"


def describe_unread(unread: Sequence[UnreadText]) -> list[str]:
    """A line for each source with columns or keys of messages that nothing reads: those that lose content first."""
    lines = []
    for key, found in groupby(unread, lambda one: one.key):
        of_source = sorted(found, key=lambda one: (not one.losing or one.ignored, -one.rows, one.name))
        shown = [_describe_unread(one) for one in of_source[:_NAMES_SHOWN]]
        more = [f"and {len(of_source) - _NAMES_SHOWN:,} others"] if len(of_source) > _NAMES_SHOWN else []
        lines.append(f"{key}: {', '.join([*shown, *more])}")
    return lines


def _describe_unread(one: UnreadText) -> str:
    column, dot, key = one.name.rpartition(".")
    name = one.name if key.strip() else f'{column}{dot}"{key}"'  # pandas' index has no name
    if one.ignored:
        return f"{name} (ignored, {format_count(one.rows, 'row')})"
    return f"{name} ({format_count(one.rows, 'row')}" + (f", content in {one.losing:,})" if one.losing else ")")


def find_data_warnings(data: Prepared) -> list[str]:
    """What a person should know of the data, though nothing keeps it from being trained."""
    found = [*data.unused_ignores]
    if data.skipped_files:
        named = ", ".join(map(str, data.skipped_files[:3])) + (", ..." if len(data.skipped_files) > 3 else "")
        found.append(
            f"{format_count(len(data.skipped_files), 'file', 'was', 'were')} skipped: a name that begins with _ or has no "
            f"known ending is not data: {named}"
        )
    if data.metadata_files:
        named = ", ".join(data.metadata_files[:3]) + (", ..." if len(data.metadata_files) > 3 else "")
        found.append(
            f"{format_count(len(data.metadata_files), 'file', 'is', 'are')} skipped, as what describes data holds no rows: "
            f"{named}"
        )
    if data.escaped:
        found.append(
            f"{format_count(data.escaped, 'row', 'has', 'have')} control tokens typed in the text, which a zero-width space "
            "breaks up (chat.control_tokens_in_text: escape)"
        )
    for name, stats in data.stats.items():
        if stats.duplicates.example:
            first, second = stats.duplicates.example
            found.append(
                f"{format_count(stats.duplicates.rows, f'{name} row', 'duplicates', 'duplicate')} another word for word: "
                f"{second} is the same as {first}"
            )
    whole, question = data.overlap.conversations, data.overlap.questions
    if whole.example:
        found.append(
            f"{format_count(whole.rows, 'validation row', 'is', 'are')} in training word for word, so the "
            f"validation loss is too low: {whole.example[1]} is the same as {whole.example[0]}"
        )
    if question.example and question.rows > whole.rows:
        found.append(
            f"{format_count(question.rows, 'validation row', 'begins', 'begin')} with a user message that is also in "
            f"training: {question.example[1]} and {question.example[0]}"
        )
    return found
