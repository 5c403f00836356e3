"""Rows of Arrow record batches (Parquet, saved data sets) as Python values: texts, numbers, and what is built of them.

No format reads anything else, so nothing else is converted: a date, a decimal or the bytes of an image becomes an
`ArrowValue`, which costs nothing and can't fail (Python's dates end with the year 9999, its time zones with those that
are installed). The same holds inside nested columns, and for a whole column of nested numbers, such as an embedding.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import pyarrow
import pyarrow.types as arrow

from train.data.formats import Row

_IS_TEXT = (arrow.is_string, arrow.is_large_string, arrow.is_string_view)
_IS_NUMBER = (arrow.is_boolean, arrow.is_integer, arrow.is_floating)
_IS_LIST = (
    *(arrow.is_list, arrow.is_large_list, arrow.is_fixed_size_list),
    *(arrow.is_list_view, arrow.is_large_list_view),
)


@dataclass(frozen=True, slots=True)
class ArrowValue:
    """A value of an Arrow type that holds no text: there, and not converted. `type`: the name that Arrow gives it."""

    type: str

    def __str__(self) -> str:
        return self.type


@dataclass(frozen=True, slots=True)
class ArrowRows:
    """Rows of a record batch."""

    first: int
    batch: pyarrow.RecordBatch

    def rows(self) -> Iterator[tuple[str, Row]]:
        """The rows as they were before Arrow."""
        names = self.batch.schema.names
        columns = [_values(column) for column in self.batch.columns]
        for number in range(self.batch.num_rows):
            yield (
                f" row {self.first + number}",
                {name: column[number] for name, column in zip(names, columns, strict=True)},
            )

    def __len__(self) -> int:
        return self.batch.num_rows


def arrow_chunks(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[ArrowRows]:
    """The rows of record batches that follow one another."""
    first = 1
    for batch in batches:
        yield ArrowRows(first, batch)
        first += batch.num_rows


def _values(column: pyarrow.Array) -> list[Any]:
    """A column in Python, null as None."""
    kind = column.type
    leaves = _leaves(kind)
    if not (any(map(_is_text, leaves)) or all(map(arrow.is_null, leaves)) or _is_number(kind)):
        return [ArrowValue(str(kind)) if there else None for there in column.is_valid().to_pylist()]
    if _convertible(kind):
        with suppress(UnicodeDecodeError):
            return [_plain(value, kind) for value in column.to_pylist()] if _inner(kind) else column.to_pylist()
    return [_converted(value) for value in column]


def _inner(kind: pyarrow.DataType) -> list[pyarrow.DataType] | None:
    """The types that `kind` is built of; None where it is a value itself."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        return [kind.storage_type]
    if arrow.is_dictionary(kind) or arrow.is_run_end_encoded(kind):
        return [kind.value_type]
    return [kind.field(number).type for number in range(kind.num_fields)] if arrow.is_nested(kind) else None


@lru_cache(maxsize=1024)
def _leaves(kind: pyarrow.DataType) -> tuple[pyarrow.DataType, ...]:
    inner = _inner(kind)
    return (kind,) if inner is None else tuple(chain.from_iterable(map(_leaves, inner)))


@lru_cache(maxsize=1024)
def _convertible(kind: pyarrow.DataType) -> bool:
    """Whether Arrow converts all of it into text and numbers, or JSON of them."""
    inner = _inner(kind)
    if inner is None:
        return _is_text(kind) or _is_number(kind) or arrow.is_null(kind)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return bool(kind.extension_name == "arrow.json")
    if arrow.is_dictionary(kind) or arrow.is_run_end_encoded(kind):
        return _inner(kind.value_type) is None and _convertible(kind.value_type)
    return not arrow.is_union(kind) and _distinct(kind) and all(map(_convertible, inner))


def _distinct(kind: pyarrow.DataType) -> bool:
    """Whether no two fields of a struct share a name, as keys of a dictionary can't."""
    names = [kind.field(number).name for number in range(kind.num_fields)] if arrow.is_struct(kind) else []
    return len(set(names)) == len(names)


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_TEXT)


def _is_number(kind: pyarrow.DataType) -> bool:
    return any(test(kind) for test in _IS_NUMBER)


def _plain(value: Any, kind: pyarrow.DataType) -> Any:
    """A converted value as the row had it: JSON parsed, and no keys that only other rows of the column have.

    Arrow gives every struct all keys that any row has, null where a row had none. A null that the row did have is lost
    with them, unless the column is one of JSON.
    """
    if value is None:
        return value
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _parsed(value)
    if arrow.is_struct(kind):
        return {key: _plain(part, kind.field(key).type) for key, part in value.items() if part is not None}
    if arrow.is_map(kind):
        return {key: _plain(part, kind.item_type) for key, part in value}
    return [_plain(part, kind.value_type) for part in value] if isinstance(value, list) else value


def _converted(scalar: pyarrow.Scalar) -> Any:
    """One value of a type that Arrow can't convert as a whole, as `_plain` gives it."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(kind, pyarrow.BaseExtensionType):
        value = _converted(scalar.value)
        return _parsed(value) if kind.extension_name == "arrow.json" else value
    if arrow.is_dictionary(kind) or arrow.is_run_end_encoded(kind) or arrow.is_union(kind):
        return _converted(scalar.value)
    if arrow.is_struct(kind):
        if not _distinct(kind):
            return ArrowValue(str(kind))
        parts = ((kind.field(number).name, scalar[number]) for number in range(kind.num_fields))
        return {name: _converted(part) for name, part in parts if part.is_valid}
    if arrow.is_map(kind):
        return {_converted(key): _converted(item) for key, item in zip(*scalar.values.flatten(), strict=True)}
    if any(test(kind) for test in _IS_LIST):
        return [_converted(part) for part in scalar.values]
    if _is_text(kind):
        return _text(scalar.as_buffer().to_pybytes())
    return scalar.as_py() if _is_number(kind) else ArrowValue(str(kind))


def _text(content: bytes) -> str:
    """`content` as UTF-8. Bytes that are none become halves of surrogate pairs, which a format refuses as it reads
    them."""
    return content.decode("utf-8", "surrogateescape")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a format that reads it says what is wrong
