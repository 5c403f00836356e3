"""Instructions out of the rows of any source: the first user turn of each, once, unless it states a style already."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from train.data.asked_rows import SourcesSection
from train.data.formats import ROLES, Conversation, Row, RowFault, convert
from train.data.near_duplicates import NearDuplicates
from train.data.sources import chunks_and_format, open_source
from train.multifaceted.collection_config import FilterSection
from train.multifaceted.instruction_filter import states_style

HAD_A_SYSTEM_MESSAGE = "row with a system message, which was ignored"
_AN = {"audience": "an"}
OF_SEVERAL_TURNS = "row of several turns, of which the first was taken"


_ANSWERS = ("output", "completion", "answer", "response")
_QUESTIONS = {"prompt": "output", "user_prompt": "output", "instruction": "output", "question": "answer",
              "query": "answer"}  # fmt: skip
"""Columns of an instruction that stands alone, and where its answer would be."""
_NO_ANSWER = "-"
"""Stands where an answer is missing, so that the row can be read; nothing is made of it."""


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
                    if isinstance(row, RowFault):
                        raise row
                    conversation = Conversation(*convert(answered(row), format), whole_place)
                except RowFault as fault:
                    nothing = Instruction(whole_place, source.path, whole_place)
                    yield nothing, [], (f"can't be read: {fault.kind}", fault.detail)
                    continue
                yield _first_turn(conversation, row, source.path)


def answered(row: Row) -> Row:
    """`row` with an answer where it has none, or one of nothing or blanks, as sets to be answered have: no answer is
    needed here, but rows are read as the trainer reads them, and it refuses those."""
    unasked = next(({column: None} for column in _QUESTIONS if column in row), {})
    unanswered = {column: _NO_ANSWER for column in _ANSWERS if column in row and _says_nothing(row[column])}
    row = {column: value for column, value in row.items() if value is not None}
    for column in ("messages", "conversations"):
        turns = _parsed(row.get(column))
        if isinstance(turns, list | tuple) and turns:
            return row | {column: _answered_turns(turns)}
    if isinstance(row.get("completion"), list | tuple) and row["completion"]:
        row["completion"] = _answered_turns(row["completion"])
    if "history" in row:
        row["history"] = _answered_pairs(_parsed(row["history"]))
    if "conversation" in row:
        row["conversation"] = _answered_exchanges(_parsed(row["conversation"]))
        return row | {column: text for column, text in unanswered.items() if column in row}
    if _QUESTIONS.keys().isdisjoint(row):
        row |= unasked  # a fault of this row alone: its columns may tell the format of all
    question = next((column for column in _QUESTIONS if column in row), None)
    if question is None or "messages" in row or "conversations" in row:
        return row
    if any(column in row and column not in unanswered for column in _ANSWERS):  # a null beside it is of another row
        return row | {column: text for column, text in unanswered.items() if column in row}
    if unanswered:
        return row | unanswered
    if isinstance(row[question], list | tuple) and question == "prompt":  # turns, as in TRL's sets of prompts
        return row | {"completion": _NO_ANSWER}
    return row | {_QUESTIONS[question]: _NO_ANSWER}


def _says_nothing(value: Any) -> bool:
    """Whether it is nothing, blanks, or a list of parts that are; a part without a text, such as an image, is not."""
    if isinstance(value, list | tuple):
        return all(_says_nothing(part.get("text", part) if isinstance(part, dict) else part) for part in value)
    return value is None or (isinstance(value, str) and not value.strip())


def _parsed(value: Any) -> Any:
    """A list that comes as a text of JSON, as CSV has it; any other value as it is, for the reader to judge."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list) else value


def _answered_turns(turns: Sequence[Any]) -> list[Any]:
    """Turns that end in an answer, and whose assistant says something each time that it neither does nor calls."""
    found = []
    role = None
    for turn in turns:
        if isinstance(turn, dict):
            name = turn["role"] if turn.get("role") is not None else turn.get("from")
            role = ROLES.get(name) if isinstance(name, str) else None
            said = turn["content"] if turn.get("content") is not None else turn.get("value")
            does = turn.get("tool_calls") or turn.get("function_call") or name == "function_call"
            if role == "assistant" and not does and _says_nothing(said):
                turn = turn | {"content": _NO_ANSWER}
        found.append(turn)
    return [*found, {"role": "assistant", "content": _NO_ANSWER}] if role == "user" else found


def _answered_pairs(pairs: Any) -> Any:
    """Alpaca's history: pairs of question and answer."""
    if not isinstance(pairs, list | tuple):
        return pairs
    return [
        [pair[0], _NO_ANSWER] if isinstance(pair, list | tuple) and len(pair) == 2 and _says_nothing(pair[1]) else pair
        for pair in pairs
    ]


def _answered_exchanges(exchanges: Any) -> Any:
    """Capybara's exchanges of input and output."""
    if not isinstance(exchanges, list | tuple):
        return exchanges
    return [
        exchange | {"output": _NO_ANSWER}
        if isinstance(exchange, dict) and _says_nothing(exchange.get("output"))
        else exchange
        for exchange in exchanges
    ]


def _first_turn(
    conversation: Conversation, row: Row, source: str
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
        return found, events, ("no user turn at the start", "")
    if conversation.tools:
        return found, events, ("needs tools", "")
    return found, events, None


def _text(row: Row, column: str) -> str:
    value: Any = row.get(column)
    return value if isinstance(value, str) else ""
