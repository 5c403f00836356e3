"""Rows of Multifaceted Bench, in the columns of the hub's set or in the older ones, and files of responses to them.

    hub     source, system, prompt, reference_answer, rubrics[]{criteria, score_descriptions}, preference_set[]
    older   system_prompt, instruction or user_prompt, rubric, preference, main_source, id; also an object of rows by id

Ids are text, also in a column of numbers, as JSON's keys are text. A row without an id gets a digest of its text, which
does not depend on the order of the rows or on the part of the set.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from train.data.sources.formats import RowError
from train.data.sources.readers import extension_of
from train.data.sources.source import read_rows
from train.errors import UserError
from train.recipe import Source

NOT_STATED = "not stated"

_NAMES: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "prompt": ("prompt", "instruction", "user_prompt"),
    "reference_answer": ("reference_answer", "reference"),
    "rubrics": ("rubrics", "rubric"),
    "preferences": ("preference_set", "preference"),
    "source": ("source", "main_source"),
}


@dataclass(frozen=True, slots=True)
class Rubric:
    """A criterion with the description of each score from 1 to 5. Dimensions that the data does not state are None."""

    criteria: str
    descriptions: tuple[str, ...]
    dimension: str | None = None
    subdimension: str | None = None


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One row of the bench. With an empty `system` the model gets no system message."""

    id: str
    place: str
    source: str
    system: str
    prompt: str
    reference: str
    rubrics: tuple[Rubric, ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """The rows to answer, and the number of rows in the data, which is larger only under a limit."""

    rows: tuple[BenchRow, ...]
    rows_in_data: int


@dataclass(frozen=True, slots=True)
class GivenResponses:
    """Existing responses to one row. `scores`: the score that the file gives each, for picking one."""

    texts: tuple[str, ...]
    scores: tuple[float, ...] | None = None


def read_bench(sources: Sequence[Source], limit: int | None = None) -> Bench:
    """Return the rows of `sources`, or the first `limit` of them.

    Raises UserError for rows that are no rows of the bench, naming the first, and for duplicate ids.
    """
    rows: list[BenchRow] = []
    errors: list[str] = []
    total = 0
    for place, raw in (placed for source in sources for placed in _raw_rows(source)):
        total += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            rows.append(_row(raw, place))
        except RowError as error:
            errors.append(f"{place}: {error}")
    if errors:
        more = f" {len(errors):,} of {total:,} rows have such an error." if len(errors) > 1 else ""
        raise UserError(
            f"{errors[0]}.{more} A row of the bench has source, system, prompt, reference_answer and rubrics, a list "
            "of {criteria, score_descriptions}, whose descriptions have the keys 1 to 5."
        )
    return Bench(tuple(islice(_with_ids(rows), limit)), total)


def _raw_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (place, row). A JSON object that is one row, or that holds rows by id, is read here: the trainer's reader
    would take the row's only list for the rows, and drop the ids.
    """
    path = Path(source.path).expanduser()
    if path.is_file() and extension_of(path) == ".json" and path.suffix.lower() in (".json", ".gz"):
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
            document = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
        except (OSError, ValueError, RecursionError):
            document = None  # the reader below raises the error
        if isinstance(document, dict) and _is_bench_row(document):
            yield f"{path} row 1", document
            return
        if isinstance(document, dict) and document and all(map(_is_bench_row, document.values())):
            for key, row in document.items():
                yield f"{path} row {key!r}", {"id": key, **row}
            return
    yield from read_rows(source)


def _is_bench_row(value: Any) -> bool:
    return isinstance(value, dict) and all(
        any(name in value for name in _NAMES[column]) for column in ("prompt", "rubrics")
    )


def _row(raw: Mapping[str, Any], place: str) -> BenchRow:
    """Return a row, with an empty id if the data has none. Raises RowError."""
    rubrics = _list(raw, "rubrics")
    preferences = _list(raw, "preferences", optional=True)
    if not rubrics:
        raise RowError("no rubric", "`rubrics` is an empty list")
    if preferences and len(preferences) != len(rubrics):
        raise RowError(
            "rubrics and preferences differ", f"there are {len(rubrics)} rubrics and {len(preferences)} preferences"
        )
    return BenchRow(
        id=_id(raw),
        place=place,
        source=_text(raw, "source", optional=True) or NOT_STATED,
        system=_text(raw, "system", may_be_empty=True),
        prompt=_text(raw, "prompt"),
        reference=_text(raw, "reference_answer"),
        rubrics=tuple(
            _rubric(rubric, preferences[number] if preferences else {}, number + 1)
            for number, rubric in enumerate(rubrics)
        ),
    )


def _id(raw: Mapping[str, Any]) -> str:
    id = raw.get("id")
    if id is None:
        return ""
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RowError("wrong type", f"`id` is of type {type(id).__name__}; it must be text or an integer")
    return str(id).strip()


def _rubric(rubric: Any, preference: Any, number: int) -> Rubric:
    if not isinstance(rubric, Mapping):
        raise RowError("wrong type", f"rubric {number} is of type {type(rubric).__name__}; it must be an object")
    criteria, descriptions = rubric.get("criteria"), rubric.get("score_descriptions")
    if not isinstance(criteria, str) or not criteria.strip():
        raise RowError("no criteria", f"rubric {number} has no `criteria`")
    by_grade = {str(grade): text for grade, text in descriptions.items()} if isinstance(descriptions, Mapping) else {}
    texts = [by_grade.get(str(grade)) for grade in range(1, 6)]
    if set(by_grade) != set("12345") or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("no score descriptions", f"rubric {number} has no text for each score from 1 to 5")
    labels = preference if isinstance(preference, Mapping) else {}
    for text in (criteria, *map(str, texts)):
        _writable(text, f"rubric {number}")
    return Rubric(criteria, tuple(map(str, texts)), _name(labels.get("dimension")), _name(labels.get("subdimension")))


def _name(value: Any) -> str | None:
    """Return the normal form of a dimension: `Background knowledge` and `background_knowledge` are the same."""
    return "_".join(value.lower().split()) or None if isinstance(value, str) else None


def _value(raw: Mapping[str, Any], column: str) -> Any:
    return next((raw[name] for name in _NAMES[column] if raw.get(name) is not None), None)


def _missing_column(column: str) -> RowError:
    return RowError("a column is missing", f"there is no {' or '.join(f'`{name}`' for name in _NAMES[column])}")


def _text(raw: Mapping[str, Any], column: str, *, optional: bool = False, may_be_empty: bool = False) -> str:
    value = _value(raw, column)
    if value is None:
        is_null = any(name in raw for name in _NAMES[column])
        if optional or (may_be_empty and is_null):
            return ""
        raise _missing_column(column)
    if not isinstance(value, str):
        raise RowError("wrong type", f"`{column}` is of type {type(value).__name__}; it must be text")
    if not (value.strip() or optional or may_be_empty):
        raise RowError("empty", f"`{column}` is empty")
    return _writable(value, f"`{column}`")


def _writable(text: str, where: str) -> str:
    """Return `text`. Raises RowError if no file and no request can hold it."""
    if re.search("[\ud800-\udfff]", text):
        raise RowError("no text", f"{where} holds half of a surrogate pair, which is no text")
    return text


def _list(raw: Mapping[str, Any], column: str, *, optional: bool = False) -> list[Any]:
    value = _value(raw, column)
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("invalid JSON", f"`{column}`: {error}") from error
    if value is None:
        if optional:
            return []
        raise _missing_column(column)
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"`{column}` is of type {type(value).__name__}; it must be a list")
    return list(value)


def _with_ids(rows: Sequence[BenchRow]) -> Iterator[BenchRow]:
    """Yield the rows, each with an id that no limit changes. Raises UserError for a duplicate id."""
    first: dict[str, BenchRow] = {}
    times: Counter[str] = Counter()
    for row in rows:
        id = row.id
        if not id:
            id = _digest(row)
            times[id] += 1
            id += f"-{times[id]}" if times[id] > 1 else ""
        if id in first:
            raise UserError(
                f"{row.place}: the id {id!r} is also that of {first[id].place}. Give each row an id of its own."
            )
        first[id] = replace(row, id=id)
    yield from first.values()


def _digest(row: BenchRow) -> str:
    texts = [row.system, row.prompt, row.reference, *(rubric.criteria for rubric in row.rubrics)]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).hexdigest()


def read_responses(path: str, rows: Sequence[BenchRow]) -> tuple[dict[str, GivenResponses], int]:
    """Read responses from a file: id -> responses, and the number of lines that belong to none of `rows`.

    A line has `response` (text) or `responses` (a list of texts), optionally `scores` (a number for each), and `id`, or
    else `prompt` and `system` under any of the bench's names. bench_rows.jsonl of an earlier run is such a file.
    Raises UserError.
    """
    by_id = {row.id: row for row in rows}
    by_text: dict[tuple[str, str], list[BenchRow]] = {}
    for row in rows:
        by_text.setdefault((row.system, row.prompt), []).append(row)
    given: dict[str, GivenResponses] = {}
    unmatched = 0
    for place, raw in read_rows(Source(path=path)):
        try:
            if isinstance(raw, RowError):
                raise raw
            responses = _responses(raw)
            id = _id(raw)
            matching = [by_id[id]] if id in by_id else []
            if not id:
                texts = (_text(raw, "system", may_be_empty=True), _text(raw, "prompt"))
                matching = by_text.get(texts, [])
        except RowError as error:
            raise UserError(
                f"{place}: {error}. A line of --responses has `response` or `responses`, and the `id` of its row, or "
                "its `system` and `prompt`."
            ) from error
        for row in matching:
            if row.id in given:
                raise UserError(f"{place}: an earlier line has responses to row {row.id!r}. Leave one of the lines in.")
            given[row.id] = responses
        unmatched += not matching
    if not given:
        raise UserError(
            f"--responses {path}: no line belongs to a row of the data, whose first id is {next(iter(by_id))!r}."
        )
    return given, unmatched


def _responses(raw: Mapping[str, Any]) -> GivenResponses:
    texts = raw.get("responses")
    if texts is None and isinstance(raw.get("answers"), list):  # bench_rows.jsonl
        texts = [answer.get("response") for answer in raw["answers"] if isinstance(answer, Mapping)]
        texts = [text for text in texts if text is not None]
    if texts is None:
        texts = [raw.get("response")]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError("no response", "there is no text in `response`, nor a list of texts in `responses`")
    texts = [_writable(text, "the response") for text in texts]
    scores = raw.get("scores")
    if scores is None:
        return GivenResponses(tuple(texts))
    if (
        not isinstance(scores, list)
        or len(scores) != len(texts)
        or not all(
            isinstance(score, int | float) and not isinstance(score, bool) and score == score for score in scores
        )
    ):
        raise RowError("wrong scores", "`scores` must be a list with a number for each of `responses`")
    return GivenResponses(tuple(texts), tuple(map(float, scores)))
