"""Instructions of a collection: the first user turn of each source row, unless it is a duplicate or states a style."""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from train.data.sources.formats import Conversation, RawRow, RowError, read_row
from train.data.sources.source import chunks_and_format, open_source
from train.datagen.deduplication import NearDuplicateFilter
from train.datagen.drop_reasons import UNREADABLE, UNSUPPORTED
from train.datagen.source_rows import SourcesSection
from train.multifaceted.collection.config import FilterSection
from train.multifaceted.collection.style_filter import find_style_statements

HAD_A_SYSTEM_MESSAGE = "row with a system message, which was ignored"
OF_SEVERAL_TURNS = "row of several turns, of which the first was taken"

_ANSWERS = frozenset(("output", "completion", "answer", "response"))
_TURNS = frozenset(("messages", "conversations", "conversation"))
_QUESTIONS = {"prompt": "output", "user_prompt": "output", "instruction": "output", "question": "answer",
              "query": "answer"}  # fmt: skip
"""Columns of a single instruction, and the column of its answer."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction and its origin."""

    place: str
    """Place of the row: data.jsonl:12."""
    main_source: str
    original_source: str
    prompt: str = ""
    number: int | None = None
    """Number among the kept instructions, from 0; None if it is dropped."""
    reason: str | None = None
    """Reason for dropping it, as the report shows it; None = it is kept."""
    detail: str = ""
    """The words of the instruction or of the reader that the reason is about."""
    events: tuple[str, ...] = ()


def iter_instructions(
    data: SourcesSection, filter: FilterSection, near_duplicates: NearDuplicateFilter | None
) -> Iterator[Instruction]:
    """Yield an instruction for each source row, up to the limit, kept or dropped. Raises UserError.

    No model is asked: the same rows give the same numbers. Of equal instructions the first is kept. One that is dropped
    for another reason counts too, so that its duplicates are dropped as duplicates.
    """
    seen: set[bytes] = set()
    kept = 0
    for instruction in islice(_read_instructions(data), data.limit):
        reason, detail = instruction.reason, instruction.detail
        if reason is None:
            reason, detail = _find_drop_reason(instruction.prompt, filter, near_duplicates, seen)
        yield replace(instruction, number=kept if reason is None else None, reason=reason, detail=detail)
        kept += reason is None


def _find_drop_reason(
    prompt: str, filter: FilterSection, near_duplicates: NearDuplicateFilter | None, seen: set[bytes]
) -> tuple[str | None, str]:
    """Return why an instruction is dropped (None = it is kept), and its words that say so."""
    digest = hashlib.blake2b(normalize(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if digest in seen:
        return "duplicate: the same as an instruction before", ""
    seen.add(digest)
    if statements := find_style_statements(prompt, filter.rules):
        words = "; ".join(f"{statement.kind}: {statement.words}" for statement in statements)
        kind = statements[0].kind
        return f"states {'an' if kind == 'audience' else 'a'} {kind} already", words
    if near_duplicates is not None and near_duplicates.is_near_duplicate(prompt):
        return "duplicate: nearly an instruction before", ""
    return None, ""


def normalize(text: str) -> str:
    """Return a text without case, repeated blanks and the last punctuation mark, to compare instructions."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(" .?!")


def _read_instructions(data: SourcesSection) -> Iterator[Instruction]:
    """Yield the first user turn of each source row, or the reason why there is none."""
    for source in data.sources:
        opened = open_source(source, data.allow_pickle)
        chunks, format = chunks_and_format(source, opened, with_answer_column)
        for file, chunk in chunks:
            for place_in_file, row in chunk.rows():
                place = opened.files[file] + place_in_file
                try:
                    if isinstance(row, RowError):
                        raise row
                    complete_row = with_answer_column(row)
                    conversation = read_row(complete_row, format, place, ignore=source.ignore, answers_needed=False)
                except RowError as error:
                    reason = f"{UNREADABLE}: {error.kind}"
                    yield Instruction(place, source.path, place, reason=reason, detail=error.detail)
                    continue
                yield _first_turn(conversation, row, source.path)


def with_answer_column(row: RawRow) -> RawRow:
    """Return a row with an empty answer column if it has none or a null: its columns determine its format."""
    columns = {column: value for column, value in row.items() if value is not None}
    if not _TURNS.isdisjoint(columns):
        return columns
    if _QUESTIONS.keys().isdisjoint(columns):  # an error of this row alone: its columns may determine the file's format
        columns |= next(({column: None} for column in _QUESTIONS if column in row), {})
    question = next((column for column in _QUESTIONS if column in columns), None)
    if question is None or not _ANSWERS.isdisjoint(columns):
        return columns
    if isinstance(columns[question], list | tuple):  # turns, as in TRL's prompt-only data sets
        return columns | {"completion": ""}
    return columns | dict.fromkeys(_ANSWERS & row.keys() or {_QUESTIONS[question]}, "")


def _first_turn(conversation: Conversation, row: RawRow, source: str) -> Instruction:
    """Return the first user turn of a conversation as an instruction."""
    users = [message["content"] for message in conversation.messages if message["role"] == "user"]
    main, original = _text(row, "main_source"), _text(row, "original_source") or _text(row, "source")
    events = []
    if any(message["role"] == "system" for message in conversation.messages):
        events.append(HAD_A_SYSTEM_MESSAGE)
    if len(users) > 1:
        events.append(OF_SEVERAL_TURNS)
    first = next((message["role"] for message in conversation.messages if message["role"] != "system"), "")
    reason = None
    if first != "user":
        reason = f"{UNSUPPORTED}: no user turn at the start"
    elif conversation.tools:
        reason = f"{UNSUPPORTED}: needs tools"
    return Instruction(
        conversation.place,
        main or source,
        original or conversation.place,
        users[0] if users else "",
        reason=reason,
        events=tuple(events),
    )


def _text(row: RawRow, column: str) -> str:
    value: Any = row.get(column)
    return value if isinstance(value, str) else ""
