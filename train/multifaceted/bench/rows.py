"""Rows of Multifaceted Bench in the columns of the hub's set and in the older ones, and files of answers to them.

    hub     source, system, prompt, reference_answer, rubrics[]{criteria, score_descriptions}, preference_set[]
    older   system_prompt, instruction or user_prompt, rubric, preference, main_source, id; also an object of rows by id

An id is a text, whatever the data makes of it: JSON's keys are texts, and a column of numbers would never meet them.
Without one, a row's id is a digest of its own words, so it stays the same in any order and in any part of the set.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from train.data.sources.formats import RowError
from train.data.sources.readers import ending_of
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
    """What is graded, and what each grade from 1 to 5 means. The dimensions are None where the data states none."""

    criteria: str
    descriptions: tuple[str, ...]
    dimension: str | None = None
    subdimension: str | None = None


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One row. `system` may be empty: the model then gets no system message."""

    id: str
    place: str
    source: str
    system: str
    prompt: str
    reference: str
    rubrics: tuple[Rubric, ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """The rows to be answered and how many the data holds: more only where a limit was asked for."""

    rows: tuple[BenchRow, ...]
    of: int


@dataclass(frozen=True, slots=True)
class GivenResponses:
    """Answers to one row that were not asked for here. `scores`: what someone's own scorer thinks of each."""

    texts: tuple[str, ...]
    scores: tuple[float, ...] | None = None


def read_bench(sources: Sequence[Source], limit: int | None = None) -> Bench:
    """Every row of `sources`, or the first `limit` of them.

    Raises UserError, which names the first row that is none of the bench, and for ids that come twice.
    """
    rows: list[BenchRow] = []
    faults: list[str] = []
    total = 0
    for place, raw in (found for source in sources for found in _raw_rows(source)):
        total += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            rows.append(_row(raw, place))
        except RowError as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        more = f" {len(faults):,} of {total:,} rows are such." if len(faults) > 1 else ""
        raise UserError(
            f"{faults[0]}.{more} A row of the bench has source, system, prompt, reference_answer and rubrics, a list "
            "of {criteria, score_descriptions}, whose descriptions have the keys 1 to 5."
        )
    return Bench(tuple(islice(_with_ids(rows), limit)), total)


def _raw_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Rows as they are. An object of JSON that is one row, or that holds rows by id, is read here: the trainer's reader
    would take the row's only list for the rows, and let go of the ids.
    """
    path = Path(source.path).expanduser()
    if path.is_file() and ending_of(path) == ".json" and path.suffix.lower() in (".json", ".gz"):
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
            document = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
        except (OSError, ValueError, RecursionError):
            document = None  # the reader knows what to say
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
        any(name in value for name in _NAMES[wanted]) for wanted in ("prompt", "rubrics")
    )


def _row(raw: Mapping[str, Any], place: str) -> BenchRow:
    """The row, its id still empty where the data has none. Raises RowFault."""
    rubrics = _list(raw, "rubrics")
    preferences = _list(raw, "preferences", optional=True)
    if not rubrics:
        raise RowError("no rubric", "`rubrics` is an empty list")
    if preferences and len(preferences) != len(rubrics):
        raise RowError(
            "rubrics and preferences differ", f"{len(rubrics)} rubrics stand beside {len(preferences)} preferences"
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
    found = raw.get("id")
    if found is None:
        return ""
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise RowError("wrong type", f"`id` is of type {type(found).__name__}; a text or a whole number is wanted")
    return str(found).strip()


def _rubric(rubric: Any, preference: Any, number: int) -> Rubric:
    if not isinstance(rubric, Mapping):
        raise RowError("wrong type", f"rubric {number} is of type {type(rubric).__name__}; an object is wanted")
    criteria, descriptions = rubric.get("criteria"), rubric.get("score_descriptions")
    if not isinstance(criteria, str) or not criteria.strip():
        raise RowError("no criteria", f"rubric {number} has no `criteria`")
    by_grade = {str(grade): text for grade, text in descriptions.items()} if isinstance(descriptions, Mapping) else {}
    texts = [by_grade.get(str(grade)) for grade in range(1, 6)]
    if set(by_grade) != set("12345") or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("no score descriptions", f"rubric {number} doesn't have a text for each of 1 to 5")
    of = preference if isinstance(preference, Mapping) else {}
    for text in (criteria, *map(str, texts)):
        _writable(text, f"rubric {number}")
    return Rubric(criteria, tuple(map(str, texts)), _name(of.get("dimension")), _name(of.get("subdimension")))


def _name(value: Any) -> str | None:
    """`Background knowledge` and `background_knowledge` are one dimension."""
    return "_".join(value.lower().split()) or None if isinstance(value, str) else None


def _value(raw: Mapping[str, Any], wanted: str) -> Any:
    return next((raw[name] for name in _NAMES[wanted] if raw.get(name) is not None), None)


def _text(raw: Mapping[str, Any], wanted: str, *, optional: bool = False, may_be_empty: bool = False) -> str:
    value = _value(raw, wanted)
    if value is None:
        named = any(name in raw for name in _NAMES[wanted])
        if optional or (may_be_empty and named):
            return ""
        raise RowError("a column is missing", f"there is no {' or '.join(f'`{name}`' for name in _NAMES[wanted])}")
    if not isinstance(value, str):
        raise RowError("wrong type", f"`{wanted}` is of type {type(value).__name__}; a text is wanted")
    if not (value.strip() or optional or may_be_empty):
        raise RowError("empty", f"`{wanted}` is empty")
    return _writable(value, f"`{wanted}`")


def _writable(text: str, what: str) -> str:
    """`text`, if a file or a request can hold it."""
    if re.search("[\ud800-\udfff]", text):
        raise RowError("no text", f"{what} holds half of a surrogate pair, which is no text")
    return text


def _list(raw: Mapping[str, Any], wanted: str, *, optional: bool = False) -> list[Any]:
    value = _value(raw, wanted)
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value)
        except ValueError as fault:
            raise RowError("invalid JSON", f"`{wanted}`: {fault}") from fault
    if value is None:
        if optional:
            return []
        raise RowError("a column is missing", f"there is no {' or '.join(f'`{name}`' for name in _NAMES[wanted])}")
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"`{wanted}` is of type {type(value).__name__}; a list is wanted")
    return list(value)


def _with_ids(rows: Sequence[BenchRow]) -> Iterator[BenchRow]:
    """The rows with an id each, known before any limit is applied. Raises UserError for one that the data has twice."""
    first: dict[str, BenchRow] = {}
    times: Counter[str] = Counter()
    done = []
    for row in rows:
        id = row.id
        if not id:
            id = _digest(row)
            times[id] += 1
            id += f"-{times[id]}" if times[id] > 1 else ""
        if id in first:
            raise UserError(
                f"{row.place}: the id {id!r} is also that of {first[id].place}. Give each row one of its own."
            )
        first[id] = row
        done.append(BenchRow(id, row.place, row.source, row.system, row.prompt, row.reference, row.rubrics))
    yield from done


def _digest(row: BenchRow) -> str:
    words = [row.system, row.prompt, row.reference, *(rubric.criteria for rubric in row.rubrics)]
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()


def read_responses(path: str, rows: Sequence[BenchRow]) -> tuple[dict[str, GivenResponses], int]:
    """Answers to `rows` from a file: id -> answers, and how many lines of the file belong to none of the rows.

    A line has `response` (a text) or `responses` (a list of texts), perhaps `scores` (a number for each), and `id`, or
    else `prompt` and `system` in any of the bench's names. bench_rows.jsonl of an earlier run is such a file.
    Raises UserError.
    """
    by_id = {row.id: row for row in rows}
    by_words: dict[tuple[str, str], list[BenchRow]] = {}
    for row in rows:
        by_words.setdefault((row.system, row.prompt), []).append(row)
    given: dict[str, GivenResponses] = {}
    strangers = 0
    for place, raw in read_rows(Source(path=path)):
        try:
            if isinstance(raw, RowError):
                raise raw
            answers = _answers(raw)
            id = _id(raw)
            matching = [by_id[id]] if id in by_id else []
            if not id:
                words = (_text(raw, "system", may_be_empty=True), _text(raw, "prompt"))
                matching = by_words.get(words, [])
        except RowError as fault:
            raise UserError(
                f"{place}: {fault}. A line of --responses has `response` or `responses`, and the `id` of its row, or "
                "its `system` and `prompt`."
            ) from fault
        for row in matching:
            if row.id in given:
                raise UserError(f"{place}: row {row.id!r} has its answers in an earlier line. Leave one of them in.")
            given[row.id] = answers
        strangers += not matching
    if not given:
        raise UserError(
            f"--responses {path}: no line belongs to a row of the data. Its ids begin with {next(iter(by_id))!r}."
        )
    return given, strangers


def _answers(raw: Mapping[str, Any]) -> GivenResponses:
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
