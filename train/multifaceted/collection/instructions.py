"""Instructions out of the rows of any source: the first user turn of each, once, unless it states a style already."""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from train.data.sources.formats import Conversation, RawRow, RowError, read_row
from train.data.sources.source import chunks_and_format, open_source
from train.datagen.deduplication import NearDuplicates
from train.datagen.drop_reasons import UNREADABLE, UNSUPPORTED
from train.datagen.source_rows import SourcesSection
from train.multifaceted.collection.config import FilterSection
from train.multifaceted.collection.style_filter import states_style

HAD_A_SYSTEM_MESSAGE = "row with a system message, which was ignored"
_AN = {"audience": "an"}
OF_SEVERAL_TURNS = "row of several turns, of which the first was taken"


_ANSWERS = frozenset(("output", "completion", "answer", "response"))
_TURNS = frozenset(("messages", "conversations", "conversation"))
_QUESTIONS = {"prompt": "output", "user_prompt": "output", "instruction": "output", "question": "answer",
              "query": "answer"}  # fmt: skip
"""Columns of an instruction that stands alone, and where its answer would be."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is asked, and where it comes from. `number`: among those that are kept, from 0; None where it is left out.

    `reason`, `detail`: why it is left out, in the words of the report, and which of its own words say so.
    """

    place: str
    main_source: str
    original_source: str
    prompt: str = ""
    number: int | None = None
    reason: str | None = None
    detail: str = ""
    events: tuple[str, ...] = ()


def instructions(data: SourcesSection, filter: FilterSection, near: NearDuplicates | None) -> Iterator[Instruction]:
    """An instruction for each row of the sources, up to the limit, kept or left out. Raises UserError.

    Nothing here asks a model: the same rows give the same numbers. Of those that are the same the first is kept; one
    that is left out for another reason counts as well, so that its twin is told to be one.
    """
    seen: set[bytes] = set()
    kept = 0
    for one, events, fault in islice(_rows(data), data.limit):
        reason, detail = fault or _why_not(one.prompt, filter, near, seen)
        number = kept if reason is None else None
        kept += reason is None
        yield Instruction(
            one.place, one.main_source, one.original_source, one.prompt, number, reason, detail, tuple(events)
        )


def _why_not(
    prompt: str, filter: FilterSection, near: NearDuplicates | None, seen: set[bytes]
) -> tuple[str | None, str]:
    digest = hashlib.blake2b(normalised(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if digest in seen:
        return "duplicate: the same as an instruction before", ""
    seen.add(digest)
    if found := states_style(prompt, filter.rules):
        words = "; ".join(f"{one.kind}: {one.words}" for one in found)
        return f"states {_AN.get(found[0].kind, 'a')} {found[0].kind} already", words
    if near is not None and near.is_near_duplicate(prompt):
        return "duplicate: nearly an instruction before", ""
    return None, ""


def normalised(text: str) -> str:
    """What two instructions share that are the same but for case, blanks and the last punctuation mark."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(" .?!")


def _rows(data: SourcesSection) -> Iterator[tuple[Instruction, list[str], tuple[str, str] | None]]:
    """Each row's first user turn, what happened to it, and why there is none."""
    for source in data.sources:
        opened = open_source(source, data.allow_pickle)
        chunks, format = chunks_and_format(source, opened, answered)
        for file, chunk in chunks:
            for place, row in chunk.rows():
                whole_place = opened.files[file] + place
                try:
                    if isinstance(row, RowError):
                        raise row
                    read = answered(row)
                    conversation = read_row(read, format, whole_place, ignore=source.ignore, answers_needed=False)
                except RowError as fault:
                    nothing = Instruction(whole_place, source.path, whole_place)
                    yield nothing, [], (f"{UNREADABLE}: {fault.kind}", fault.detail)
                    continue
                yield _first_turn(conversation, row, source.path)


def answered(row: RawRow) -> RawRow:
    """`row` with a column for an answer, empty, where it has none or a null: its columns tell how it is to be read."""
    given = {column: value for column, value in row.items() if value is not None}
    if not _TURNS.isdisjoint(given):
        return given
    if _QUESTIONS.keys().isdisjoint(given):  # a fault of this row alone: its columns may tell the format of all
        given |= next(({column: None} for column in _QUESTIONS if column in row), {})
    question = next((column for column in _QUESTIONS if column in given), None)
    if question is None or not _ANSWERS.isdisjoint(given):
        return given
    if isinstance(given[question], list | tuple):  # turns, as in TRL's sets of prompts
        return given | {"completion": ""}
    return given | dict.fromkeys(_ANSWERS & row.keys() or {_QUESTIONS[question]}, "")


def _first_turn(
    conversation: Conversation, row: RawRow, source: str
) -> tuple[Instruction, list[str], tuple[str, str] | None]:
    users = [message["content"] for message in conversation.messages if message["role"] == "user"]
    main, original = _text(row, "main_source"), _text(row, "original_source") or _text(row, "source")
    found = Instruction(conversation.place, main or source, original or conversation.place, users[0] if users else "")
    events = []
    if any(message["role"] == "system" for message in conversation.messages):
        events.append(HAD_A_SYSTEM_MESSAGE)
    if len(users) > 1:
        events.append(OF_SEVERAL_TURNS)
    first = next((message["role"] for message in conversation.messages if message["role"] != "system"), "")
    if first != "user":
        return found, events, (f"{UNSUPPORTED}: no user turn at the start", "")
    if conversation.tools:
        return found, events, (f"{UNSUPPORTED}: needs tools", "")
    return found, events, None


def _text(row: RawRow, column: str) -> str:
    value: Any = row.get(column)
    return value if isinstance(value, str) else ""
